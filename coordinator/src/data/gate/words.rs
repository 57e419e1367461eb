//! Texts as words: what the rows of a table have in common, and a small sketch of what each has of its own. Rows of one
//! source are found by it, whatever template rendered them.

/// Words in a row that, where many rows have them, belong to the template.
const FRAME: usize = 3;
/// Words in a row that, where two rows have them, hint at one source.
const SHINGLE: usize = 6;
/// Rows that a table's common words are learned from.
pub const SAMPLE: usize = 256;
/// Fewer rows tell nothing of what is common.
const LEAST: usize = 16;
/// Smallest hashes that are kept of a text's word sequences.
pub const KEPT: usize = 12;

/// Mixes all bits into all bits: the finalizer of splitmix64 (Steele, Lea, Flood 2014).
pub fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Indexes of `count` rows out of `rows`, or of all: one out of each of `count` equal stretches. Which one is scrambled,
/// so that it does not go along with a file that takes its templates in turn.
pub fn sample(rows: usize, count: usize) -> impl Iterator<Item = usize> {
    let count = count.min(rows);
    (0..count).map(move |k| {
        let (from, to) = (k * rows / count, (k + 1) * rows / count);
        from + (mix(k as u64) % (to - from) as u64) as usize
    })
}

/// FNV-1a, one byte more.
fn step(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
}

const START: u64 = 0xCBF2_9CE4_8422_2325;

/// Hashes of the words of `text`, without regard to case. A word is a run of letters and digits; an ideograph or a kana
/// is a word of its own, since its script puts no spaces between words.
pub fn words(text: &str, into: &mut Vec<u64>) {
    let mut word = START;
    let mut open = false;
    let mut close = |word: &mut u64, open: &mut bool| {
        if std::mem::take(open) {
            into.push(mix(std::mem::replace(word, START)));
        }
    };
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte.is_ascii() {
            match byte.is_ascii_alphanumeric() {
                // Setting the bit makes a capital letter small, and leaves digits apart from each other.
                true => (word, open) = (step(word, byte | 0x20), true),
                false => close(&mut word, &mut open),
            }
            at += 1;
            continue;
        }
        let c = text[at..].chars().next().expect("a byte that is not ASCII begins a character here");
        at += c.len_utf8();
        if !c.is_alphanumeric() {
            close(&mut word, &mut open);
            continue;
        }
        let alone = matches!(c, '\u{3040}'..='\u{30FF}' | '\u{3400}'..='\u{9FFF}' | '\u{20000}'..='\u{3FFFF}');
        if alone {
            close(&mut word, &mut open);
        }
        for lower in c.to_lowercase() {
            word = (lower as u32).to_le_bytes().iter().fold(word, |hash, &byte| step(hash, byte));
        }
        open = true;
        if alone {
            close(&mut word, &mut open);
        }
    }
    close(&mut word, &mut open);
}

/// Factor of the rolling hash of a sequence (Karp and Rabin 1987, modulo 2^64 over mixed words).
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

/// Hashes of all sequences of `length` words, in order.
fn sequences(words: &[u64], length: usize) -> impl Iterator<Item = u64> + '_ {
    let leaving = (0..length).fold(1u64, |power, _| power.wrapping_mul(FACTOR));
    let mut rolling = 0u64;
    words.iter().enumerate().filter_map(move |(at, &word)| {
        rolling = rolling.wrapping_mul(FACTOR).wrapping_add(word);
        if at >= length {
            rolling = rolling.wrapping_sub(words[at - length].wrapping_mul(leaving));
        }
        (at + 1 >= length).then(|| mix(rolling))
    })
}

/// The word sequences that many rows of a table have: its template.
#[derive(Debug, Clone, Default)]
pub struct Frame {
    /// Sorted.
    known: Vec<u64>,
    /// A bit for each of them by its lowest bits: most sequences of a text are none, and this says so at once.
    bits: Vec<u64>,
}

impl Frame {
    /// From up to [`SAMPLE`] rows of a table, each given by its texts.
    pub fn learn<'t, R: IntoIterator<Item = &'t str>>(rows: impl IntoIterator<Item = R>) -> Self {
        let mut counted: Vec<u64> = Vec::new();
        let mut total = 0usize;
        let mut buffer = Vec::new();
        for row in rows {
            let mut own: Vec<u64> = Vec::new();
            for text in row {
                buffer.clear();
                words(text, &mut buffer);
                own.extend(sequences(&buffer, FRAME));
            }
            own.sort_unstable();
            own.dedup();
            counted.extend(own);
            total += 1;
        }
        if total < LEAST {
            return Frame::default();
        }
        counted.sort_unstable();
        let many = (total * 3 / 100).max(8);
        let known: Vec<u64> = counted.chunk_by(|a, b| a == b).filter(|same| same.len() >= many).map(|s| s[0]).collect();
        let mut bits = vec![0u64; 1 << 10];
        for hash in &known {
            bits[(hash >> 6) as usize & 1023] |= 1 << (hash & 63);
        }
        Frame { known, bits }
    }

    fn holds(&self, hash: u64) -> bool {
        let word = self.bits.get((hash >> 6) as usize & 1023);
        word.is_some_and(|word| word >> (hash & 63) & 1 == 1) && self.known.binary_search(&hash).is_ok()
    }
}

/// The smallest hashes of a text's own word sequences: enough to estimate how much of one text another holds
/// (bottom-k sketch; Cohen and Kaplan 2007).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sketch {
    /// Sorted; `u32::MAX` where there are fewer.
    pub least: [u32; KEPT],
    /// Sequences in all.
    pub count: u16,
}

impl Sketch {
    /// Of what `texts` have of their own.
    pub fn of<'t>(texts: impl IntoIterator<Item = &'t str>, frame: &Frame) -> Self {
        let (mut buffer, mut hashes, mut covered) = (Vec::new(), Vec::new(), Vec::new());
        for text in texts {
            buffer.clear();
            words(text, &mut buffer);
            covered.clear();
            covered.resize(buffer.len(), false);
            for (at, hash) in sequences(&buffer, FRAME).enumerate() {
                if frame.holds(hash) {
                    covered[at..at + FRAME].fill(true);
                }
            }
            let mut from = 0;
            for run in covered.chunk_by(|a, b| a == b) {
                let own = &buffer[from..from + run.len()];
                if !run[0] {
                    hashes.extend(sequences(own, SHINGLE).map(|hash| (hash >> 32) as u32));
                }
                from += run.len();
            }
        }
        if hashes.len() > 4 * KEPT {
            // Repeats of the smallest ones would crowd others out, hence the margin.
            hashes.select_nth_unstable(4 * KEPT);
            let bound = hashes[4 * KEPT];
            let total = hashes.len();
            hashes.truncate(4 * KEPT);
            hashes.retain(|&hash| hash < bound);
            return Self::keep(hashes, total);
        }
        let total = hashes.len();
        Self::keep(hashes, total)
    }

    fn keep(mut hashes: Vec<u32>, total: usize) -> Self {
        hashes.sort_unstable();
        hashes.dedup();
        let mut least = [u32::MAX; KEPT];
        let kept = hashes.len().min(KEPT);
        least[..kept].copy_from_slice(&hashes[..kept]);
        let count = if total > kept && kept == KEPT { total.max(KEPT + 1) } else { kept };
        Sketch { least, count: count.min(usize::from(u16::MAX)) as u16 }
    }

    pub fn kept(&self) -> &[u32] {
        &self.least[..usize::from(self.count).min(KEPT)]
    }

    /// Up to which hash the sketch knows all.
    fn whole(&self) -> u32 {
        match usize::from(self.count) > KEPT {
            true => self.least[KEPT - 1],
            false => u32::MAX,
        }
    }

    /// The share of the smaller text's sequences that the other holds, as far as the sketches tell; 0 where they tell
    /// too little.
    pub fn held(&self, other: &Sketch) -> f64 {
        let bound = self.whole().min(other.whole());
        let below = |sketch: &Sketch| sketch.kept().partition_point(|&hash| hash <= bound);
        let (a, b) = (&self.kept()[..below(self)], &other.kept()[..below(other)]);
        let smaller = a.len().min(b.len());
        let shared = a.iter().filter(|hash| b.binary_search(hash).is_ok()).count();
        if shared < 3 {
            return 0.0;
        }
        shared as f64 / smaller as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(text: &str) -> Vec<u64> {
        let mut found = Vec::new();
        words(text, &mut found);
        found
    }

    #[test]
    fn words_know_neither_case_nor_marks() {
        assert_eq!(hashes("Hello, WORLD-7!"), hashes("hello world  7"));
        assert_eq!(hashes("ÄRGER"), hashes("ärger"));
        assert_ne!(hashes("ab c"), hashes("a bc"));
        assert_eq!(hashes("日本語").len(), 3);
        assert!(hashes(" .,\n").is_empty());
        assert_ne!(hashes("1"), hashes("q"));
    }

    #[test]
    fn a_sample_is_even_and_does_not_follow_a_rhythm() {
        let found: Vec<usize> = sample(4000, 256).collect();
        assert!(found.len() == 256 && found.windows(2).all(|pair| pair[0] < pair[1]) && found[255] < 4000);
        for template in 0..10 {
            assert!(found.iter().filter(|&&row| row % 10 == template).count() >= 8, "{template}");
        }
        assert_eq!(sample(3, 256).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(sample(0, 256).count(), 0);
    }

    #[test]
    fn a_sequence_is_the_same_wherever_it_stands() {
        let (a, b) = (hashes("one two three four five"), hashes("zero two three four five six"));
        let (a, b): (Vec<u64>, Vec<u64>) = (sequences(&a, 3).collect(), sequences(&b, 3).collect());
        assert_eq!((a.len(), b.len(), &a[1..]), (3, 4, &b[1..3]));
        assert_eq!(sequences(&hashes("one two"), 3).count(), 0);
    }

    fn source(n: usize) -> String {
        (0..40).map(|i| format!("w{} ", mix((n * 1000 + i) as u64) % 5000)).collect()
    }

    #[test]
    fn rows_of_one_source_are_alike_through_two_templates_and_others_are_not() {
        let first: Vec<String> = (0..60).map(|n| format!("Please summarise this article: {}", source(n))).collect();
        let second: Vec<String> =
            (0..60).map(|n| format!("{}\nWhich section of a newspaper would print it?", source(n))).collect();
        let learn = |rows: &[String]| Frame::learn(rows.iter().map(|r| [r.as_str()]));
        let (a, b) = (learn(&first), learn(&second));
        let a: Vec<Sketch> = first.iter().map(|r| Sketch::of([r.as_str()], &a)).collect();
        let b: Vec<Sketch> = second.iter().map(|r| Sketch::of([r.as_str()], &b)).collect();
        for (i, first) in a.iter().enumerate() {
            for (j, second) in b.iter().enumerate() {
                assert_eq!(first.held(second) > 0.5, i == j, "{i} {j}");
            }
        }
        // Half of a text is found in the whole.
        let half: String = source(7).split_inclusive(' ').take(20).collect();
        assert!(Sketch::of([half.as_str()], &Frame::default()).held(&a[7]) > 0.5);
    }

    #[test]
    fn what_all_rows_say_is_no_ones_own() {
        let rows: Vec<String> =
            (0..30).map(|n| format!("A long question that each of the rows asks alike: {n}")).collect();
        let frame = Frame::learn(rows.iter().map(|r| [r.as_str()]));
        assert!(rows.iter().all(|r| Sketch::of([r.as_str()], &frame).count == 0));
        assert!(Sketch::of([rows[0].as_str()], &Frame::default()).count > 0);
    }
}
