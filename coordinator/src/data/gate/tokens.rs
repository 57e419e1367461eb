//! What the tokens of a row tell, and what that says of its task. Rows are looked at on any thread, and counted in order.

use super::finding::{amount, Finding, SHOWN};
use super::kind::Kind;
use crate::data::{Example, TextTokenizer};
use unisono_configs::run::Gate;

/// The ids that the checks know.
#[derive(Debug, Clone)]
pub struct Ids {
    /// Ends of text, of a turn too.
    ends: Vec<u32>,
    begin: Option<u32>,
    unknown: Option<u32>,
}

/// Flaws of one row's tokens, in the order of [`KINDS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TokenFlaws(u8);

impl TokenFlaws {
    /// For keeping them.
    pub fn bits(self) -> u8 {
        self.0
    }

    pub fn from_bits(bits: u8) -> Self {
        TokenFlaws(bits)
    }
}

/// Tokens among which the end of text must be at the end of a row.
const TAIL: usize = 3;

const KINDS: [Kind; 5] = [Kind::Truncated, Kind::MissingEos, Kind::DoubledEos, Kind::DoubledBos, Kind::UnknownTokens];

impl Ids {
    pub fn new(tokenizer: &TextTokenizer) -> Self {
        Ids { ends: tokenizer.ends().to_vec(), begin: tokenizer.begin(), unknown: tokenizer.unknown() }
    }

    /// `truncated`: the row was cut at its right end.
    pub fn look(&self, example: &Example, truncated: bool) -> TokenFlaws {
        let tokens = &example.tokens;
        let first = example.first_target();
        let is_end = |id: &u32| self.ends.contains(id);
        let asked = &tokens[first..];
        // A chat template may write a line end after the end of a turn.
        let tail = asked.len().saturating_sub(TAIL);
        let doubled = match example.gaps.is_empty() {
            // One completion.
            true => asked[..tail].iter().any(is_end) || asked[tail..].iter().filter(|id| is_end(id)).count() > 1,
            // Several turns.
            false => asked.windows(2).any(|pair| is_end(&pair[0]) && is_end(&pair[1])),
        };
        let begins = |id: &u32| self.begin == Some(*id);
        let flaws = [
            truncated,
            !truncated && !asked[tail..].iter().any(is_end),
            doubled,
            tokens.len() > 1 && begins(&tokens[0]) && begins(&tokens[1]),
            tokens.iter().any(|id| self.unknown == Some(*id)),
        ];
        TokenFlaws(flaws.iter().enumerate().map(|(bit, &flaw)| u8::from(flaw) << bit).sum())
    }
}

#[derive(Debug, Default)]
struct Task {
    name: String,
    rows: u64,
    found: [(u64, Vec<String>); 5],
}

/// The flaws of all rows.
#[derive(Debug, Default)]
pub struct Tokens {
    tasks: Vec<Task>,
}

impl Tokens {
    /// A further task. Returns its number.
    pub fn task(&mut self, name: &str) -> u32 {
        self.tasks.push(Task { name: name.into(), ..Task::default() });
        self.tasks.len() as u32 - 1
    }

    /// The next row; `place` is asked where it is only if that will be shown.
    pub fn row(&mut self, task: u32, flaws: TokenFlaws, place: impl Fn() -> String) {
        let task = &mut self.tasks[task as usize];
        task.rows += 1;
        for (bit, (count, places)) in task.found.iter_mut().enumerate() {
            if flaws.0 >> bit & 1 == 1 {
                *count += 1;
                if places.len() < SHOWN {
                    places.push(place());
                }
            }
        }
    }

    pub fn finish(&self, gate: &Gate) -> Vec<Finding> {
        let mut findings = Vec::new();
        for task in &self.tasks {
            for (&kind, (count, places)) in KINDS.iter().zip(&task.found).filter(|(_, (count, _))| *count > 0) {
                let text = amount(*count, task.rows, "row");
                let finding = Finding::new(gate, kind, &task.name, *count, task.rows, text);
                findings.extend(finding.map(|f| f.at(places.clone())));
            }
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flaws(tokens: &[u32], prompt: u32, gap: std::ops::Range<u32>, truncated: bool) -> Vec<Kind> {
        let ids = Ids { ends: vec![0, 9], begin: Some(1), unknown: Some(2) };
        let example = Example {
            task: 0,
            row: 0,
            tokens: tokens.into(),
            prompt,
            gaps: std::iter::once(gap).filter(|gap| !gap.is_empty()).collect(),
        };
        let found = ids.look(&example, truncated);
        KINDS.into_iter().enumerate().filter(|(bit, _)| found.0 >> bit & 1 == 1).map(|(_, kind)| kind).collect()
    }

    #[test]
    fn each_flaw_is_seen_and_a_plain_row_has_none() {
        assert_eq!(flaws(&[1, 5, 6, 7, 0], 3, 0..0, false), []);
        assert_eq!(flaws(&[1, 5, 0, 7, 9, 5, 7, 0], 3, 5..6, false), []);
        assert_eq!(flaws(&[1, 5, 6, 7, 8], 3, 0..0, true), [Kind::Truncated]);
        assert_eq!(flaws(&[1, 5, 6, 7, 8], 3, 0..0, false), [Kind::MissingEos]);
        assert_eq!(flaws(&[1, 5, 6, 0, 0], 3, 0..0, false), [Kind::DoubledEos]);
        assert_eq!(flaws(&[1, 5, 6, 7, 9, 0, 5, 7, 0], 3, 6..7, false), [Kind::DoubledEos]);
        assert_eq!(flaws(&[1, 1, 6, 7, 0], 3, 0..0, false), [Kind::DoubledBos]);
        assert_eq!(flaws(&[1, 5, 2, 7, 0], 3, 0..0, false), [Kind::UnknownTokens]);
    }

    #[test]
    fn findings_count_rows_and_show_the_first() {
        let mut tokens = Tokens::default();
        let task = tokens.task("t");
        for row in 0..10u64 {
            tokens.row(task, TokenFlaws(u8::from(row % 2 == 0)), || format!("a.jsonl:{row}"));
        }
        let found = tokens.finish(&Gate::default());
        assert_eq!((found.len(), found[0].kind, found[0].count, found[0].of), (1, Kind::Truncated, 5, 10));
        assert_eq!(found[0].places, ["a.jsonl:0", "a.jsonl:2", "a.jsonl:4"]);
    }
}
