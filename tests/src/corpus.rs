//! Small instruction tasks made from a seed: the data of the tests.

use serde_json::{json, Value};
use std::path::Path;

/// Numbers from a seed: SplitMix64 (Steele, Lea & Flood 2014).
#[derive(Debug, Clone)]
pub struct Numbers(pub u64);

impl Numbers {
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }

    fn word(&mut self) -> String {
        let length = 2 + self.below(4);
        (0..length).map(|_| char::from(b'a' + self.below(8) as u8)).collect()
    }
}

/// Things and what they are: quickly learnt, so that a short run shows.
const KINDS: &[(&str, &[&str])] = &[
    ("bird", &["robin", "heron", "swift", "finch"]),
    ("fish", &["trout", "perch", "tench", "bream"]),
    ("tree", &["maple", "birch", "alder", "rowan"]),
    ("tool", &["lathe", "anvil", "chisel", "plane"]),
];

/// `rows` examples of three tasks: copy, add and, in every other row, kind. Lengths differ, so that packing has
/// something to do.
pub fn rows(seed: u64, rows: usize) -> Vec<Value> {
    let mut numbers = Numbers(seed);
    (0..rows)
        .map(|index| match index % 4 {
            0 => {
                let words: Vec<String> = (0..1 + numbers.below(5)).map(|_| numbers.word()).collect();
                let words = words.join(" ");
                json!({"prompt": format!("Copy: {words}\nAnswer:"), "completion": format!(" {words}")})
            }
            2 => {
                let (a, b) = (numbers.below(50), numbers.below(50));
                json!({"prompt": format!("Add: {a} + {b}\nAnswer:"), "completion": format!(" {}", a + b)})
            }
            _ => {
                let (kind, things) = KINDS[numbers.below(KINDS.len() as u64) as usize];
                let thing = things[numbers.below(things.len() as u64) as usize];
                json!({"prompt": format!("Kind: {thing}\nAnswer:"), "completion": format!(" a {kind}, of course.")})
            }
        })
        .collect()
}

/// Writes rows as JSONL.
pub fn write(path: &Path, rows: &[Value]) {
    let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(path, text).expect("the test's directory can be written");
}
