//! How many answers are right, and how many a guesser would have right.

use super::corpus::Row;
use std::collections::BTreeMap;

/// What a model wrote after a prompt.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct Answer {
    pub completion: String,
    /// It stopped by itself.
    pub ended: bool,
}

impl Answer {
    /// Word for word, and nothing after it.
    pub fn is_right(&self, row: &Row) -> bool {
        self.ended && self.completion == row.completion
    }
}

/// Share of right answers.
pub fn exact(rows: &[Row], answers: &[Answer]) -> f64 {
    let right = rows.iter().zip(answers).filter(|(row, answer)| answer.is_right(row)).count();
    share(right, rows.len())
}

/// Share of right answers of someone who always gives the most frequent one.
pub fn majority(rows: &[Row]) -> f64 {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for row in rows {
        *counts.entry(&row.completion).or_default() += 1;
    }
    share(counts.into_values().max().unwrap_or(0), rows.len())
}

fn share(count: usize, of: usize) -> f64 {
    if of == 0 {
        0.0
    } else {
        count as f64 / of as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(completion: &str) -> Row {
        Row { prompt: String::new(), completion: completion.into() }
    }

    fn answer(completion: &str, ended: bool) -> Answer {
        Answer { completion: completion.into(), ended }
    }

    #[test]
    fn an_answer_counts_when_it_is_whole_and_ends() {
        let rows = [row("a"), row("b"), row("c"), row("d")];
        let answers = [answer("a", true), answer("b", false), answer("c c", true), answer("d", true)];
        assert_eq!(exact(&rows, &answers), 0.5);
        // An answer that is missing is wrong.
        assert_eq!(exact(&rows, &answers[..1]), 0.25);
    }

    #[test]
    fn the_majority_is_the_best_constant_answer() {
        assert_eq!(majority(&[row("a"), row("b"), row("a"), row("c")]), 0.5);
        assert_eq!(majority(&[]), 0.0);
    }
}
