//! The answers of one task, as far as they are labels: few and short.

use super::finding::SHOWN;
use super::kind::Kind;
use super::text::Place;
use std::collections::BTreeMap;
use unisono_configs::run::Gate;

#[derive(Debug)]
struct Label {
    text: Box<str>,
    count: u64,
    places: Vec<Place>,
}

/// Counts answers until there are too many different ones for labels.
#[derive(Debug)]
pub struct Answers {
    /// None: the task is not one of labels.
    labels: Option<BTreeMap<u64, Label>>,
    most: usize,
    rows: u64,
}

/// A kind, the rows concerned, the sentence, and the first places.
pub type Judgement = (Kind, u64, String, Vec<Place>);

impl Answers {
    pub fn new(most: usize) -> Self {
        Answers { labels: Some(BTreeMap::new()), most, rows: 0 }
    }

    pub fn add(&mut self, answer: u64, label: Option<Box<str>>, place: Place) {
        self.rows += 1;
        let Some(labels) = &mut self.labels else { return };
        if let Some(known) = labels.get_mut(&answer) {
            known.count += 1;
            if known.places.len() < SHOWN {
                known.places.push(place);
            }
            return;
        }
        // A single long answer is one answer, too.
        let text = label.or_else(|| labels.is_empty().then(|| "...".into()));
        match text.filter(|_| labels.len() < self.most) {
            Some(text) => _ = labels.insert(answer, Label { text, count: 1, places: vec![place] }),
            None => self.labels = None,
        }
    }

    pub fn judge(&self, gate: &Gate) -> Vec<Judgement> {
        let Some(labels) = &self.labels else { return Vec::new() };
        if self.rows < gate.least_rows as u64 {
            return Vec::new();
        }
        let mut found = Vec::new();
        let Some(most) = labels.values().max_by_key(|label| label.count) else { return found };
        let (count, rows) = (most.count, self.rows);
        if labels.len() == 1 {
            let text = format!("all {rows} rows answer \"{}\"", most.text);
            found.push((Kind::SingleLabel, rows, text, most.places.clone()));
        } else if count as f64 >= gate.skew * rows as f64 {
            let text = format!("{count} of {rows} rows answer \"{}\", the rest one of {}", most.text, labels.len() - 1);
            found.push((Kind::SkewedLabels, count, text, most.places.clone()));
        }
        let mut alike: BTreeMap<String, Vec<&Label>> = BTreeMap::new();
        for label in labels.values() {
            alike.entry(plain(&label.text)).or_default().push(label);
        }
        for (name, mut same) in alike {
            if same.len() < 2 || name.is_empty() {
                continue;
            }
            same.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.text.cmp(&b.text)));
            let odd: u64 = same[1..].iter().map(|label| label.count).sum();
            let listed: Vec<String> = same.iter().map(|label| format!("\"{}\"", label.text)).collect();
            let text = listed.join(", ");
            found.push((Kind::LabelVariants, odd, text, same[1].places.clone()));
        }
        found
    }
}

/// Without case, spaces and closing marks.
fn plain(text: &str) -> String {
    text.to_lowercase().split_whitespace().collect::<Vec<_>>().join(" ").trim_end_matches(['.', '!']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_configs::run::Gate;

    fn judged(answers: impl IntoIterator<Item = String>) -> Vec<(Kind, u64)> {
        let mut all = Answers::new(20);
        for (line, text) in answers.into_iter().enumerate() {
            let hash = text.bytes().fold(7u64, |h, b| h.wrapping_mul(31) + u64::from(b));
            all.add(hash, Some(text.into()), Place { file: 0, line: line as u32 });
        }
        all.judge(&Gate::default()).into_iter().map(|(kind, count, ..)| (kind, count)).collect()
    }

    #[test]
    fn labels_are_judged_and_free_answers_are_not() {
        let repeat = |text: &str, n| vec![text.to_owned(); n];
        assert_eq!(judged(repeat("Company", 30)), [(Kind::SingleLabel, 30)]);
        assert_eq!(judged(repeat("Company", 10)), []);
        assert_eq!(judged([repeat("no", 97), repeat("yes", 3)].concat()), [(Kind::SkewedLabels, 97)]);
        assert_eq!(judged([repeat("no", 60), repeat("yes", 40)].concat()), []);
        let spelt = [repeat("no", 60), repeat("yes", 40), repeat("No.", 2), repeat("YES", 1)].concat();
        assert_eq!(judged(spelt), [(Kind::LabelVariants, 2), (Kind::LabelVariants, 1)]);
        assert_eq!(judged((0..200).map(|i| format!("{i}"))), []);
    }
}
