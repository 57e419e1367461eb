//! Tests of the token cache: what was written is read, what was damaged is not.

use super::*;
use proptest::prelude::*;

fn entry() -> impl Strategy<Value = Entry> {
    let tokens = prop_oneof![prop::collection::vec(0u32..65_536, 2..30), prop::collection::vec(0u32..200_000, 2..30)];
    (tokens, 0u32..3, 0usize..3).prop_map(|(tokens, prompt, gaps)| {
        let gaps = (0..gaps as u32).map(|i| 3 + 2 * i..4 + 2 * i).collect();
        Entry { tokens: tokens.into(), prompt, gaps }
    })
}

fn measure(entry: &Entry) -> Measure {
    let (tokens, flaws) = (entry.tokens.len() as u32, entry.gaps.len() as u8 * 100);
    Measure { tokens, targets: 7, unasked: entry.prompt, truncated: entry.prompt == 1, flaws }
}

fn write(cache: &Cache, entries: &[Entry]) -> Vec<Place> {
    let keyed = entries.iter().enumerate().map(|(i, e)| (i as u128 * 3, measure(e), e));
    cache.append(keyed).unwrap()
}

/// What is found, by key; every entry is read.
fn found(cache: &Cache) -> Vec<(u128, Measure, Option<Entry>)> {
    let mut all = Vec::new();
    cache.scan(|key, measure, place| {
        all.push((key, measure, place));
        true
    });
    all.into_iter().map(|(key, measure, place)| (key, measure, cache.read(place, measure))).collect()
}

fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    all.retain(|p| p.extension().is_some_and(|e| e == ending));
    all.sort();
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_was_written_is_found_by_the_next_run(first in prop::collection::vec(entry(), 1..9), second in prop::collection::vec(entry(), 0..9)) {
        let root = tempfile::tempdir().unwrap();
        {
            let cache = Cache::open(root.path(), b"a").unwrap();
            let places = write(&cache, &first);
            for (place, entry) in places.iter().zip(&first) {
                prop_assert_eq!(cache.read(*place, measure(entry)), Some(entry.clone()));
            }
            // A second run beside the first writes a segment of its own.
            write(&Cache::open(root.path(), b"a").unwrap(), &second);
            write(&cache, &first[..1]);
        }
        let cache = Cache::open(root.path(), b"a").unwrap();
        let all = found(&cache);
        prop_assert_eq!(all.len(), first.len() + 1 + second.len());
        for (key, told, read) in all {
            let index = (key / 3) as usize;
            let read = read.unwrap();
            prop_assert_eq!(told, measure(&read));
            prop_assert!(first.get(index) == Some(&read) || second.get(index) == Some(&read));
        }
        prop_assert!(found(&Cache::open(root.path(), b"b").unwrap()).is_empty(), "another tokenizer");
    }

    /// Whatever bytes are lost or changed: no entry comes back as another one.
    #[test]
    fn damage_is_noticed(
        entries in prop::collection::vec(entry(), 1..9), cut: bool, index: bool, at: prop::sample::Index, flip in 1u8..=255,
    ) {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::open(root.path(), b"a").unwrap();
        write(&cache, &entries);
        let path = &files(cache.directory(), if index { "index" } else { "tokens" })[0];
        let mut bytes = fs::read(path).unwrap();
        let at = at.index(bytes.len());
        match cut {
            true => bytes.truncate(at),
            false => bytes[at] ^= flip,
        }
        fs::write(path, bytes).unwrap();
        let cache = Cache::open(root.path(), b"a").unwrap();
        let mut whole = 0;
        for (key, told, read) in found(&cache) {
            let expected = &entries[(key / 3) as usize];
            prop_assert_eq!(told, measure(expected));
            if let Some(read) = read {
                prop_assert_eq!(&read, expected);
                whole += 1;
            }
        }
        let in_magic = index && at < MAGIC.len();
        if !cut && !in_magic {
            prop_assert_eq!(whole, entries.len() - 1);
        }
    }
}

#[test]
fn the_segment_that_was_not_used_for_longest_goes_first() {
    let root = tempfile::tempdir().unwrap();
    let entry = Entry { tokens: [1, 2, 3].into(), prompt: 1, gaps: Box::default() };
    let old = SystemTime::now() - std::time::Duration::from_secs(60);
    for (identity, aged) in [(b"a", true), (b"b", false), (b"c", true)] {
        let cache = Cache::open(root.path(), identity).unwrap();
        write(&cache, std::slice::from_ref(&entry));
        if aged {
            let path = &files(cache.directory(), "tokens")[0];
            File::options().append(true).open(path).unwrap().set_modified(old).unwrap();
        }
    }
    // Using it makes it young again.
    assert_eq!(found(&Cache::open(root.path(), b"c").unwrap()).len(), 1);
    let whole = make_room(root.path(), u64::MAX);
    assert_eq!((whole.bytes % 3, whole.removed), (0, 0));
    let less = make_room(root.path(), whole.bytes - 1);
    assert_eq!((less.bytes, less.removed), (whole.bytes / 3 * 2, whole.bytes / 3));
    let left = |identity: &[u8]| found(&Cache::open(root.path(), identity).unwrap()).len();
    assert_eq!((left(b"a"), left(b"b"), left(b"c")), (0, 1, 1));
    let writing = Cache::open(root.path(), b"d").unwrap();
    write(&writing, std::slice::from_ref(&entry));
    make_room(root.path(), 0);
    assert_eq!((left(b"b"), left(b"c"), left(b"d")), (0, 0, 1), "a run writes the last one");
}

#[test]
fn a_disk_that_cannot_be_written_is_told_of_once() {
    let root = tempfile::tempdir().unwrap();
    let cache = Cache::open(root.path(), b"a").unwrap();
    fs::remove_dir(cache.directory()).unwrap();
    let entry = Entry { tokens: [1, 2, 3].into(), prompt: 1, gaps: Box::default() };
    let append = || cache.append([(1, measure(&entry), &entry)].into_iter());
    assert!(append().is_err());
    assert_eq!(append().unwrap(), []);
}
