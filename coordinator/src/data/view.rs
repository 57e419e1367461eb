//! What a person looks at before training: counts per task, and rows as tokens with the loss mask visible.

use super::{Example, Report, TextTokenizer};
use serde_json::{json, Value};

const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";
/// Neighbouring completion tokens differ in colour, so that their boundaries show.
const COMPLETION: [&str; 2] = ["\x1b[1;32m", "\x1b[1;36m"];
const END: &str = "\x1b[7;33m";

/// One line per task, and what was dropped or cut.
pub fn table(reports: &[Report]) -> String {
    let head =
        ["task", "format", "rows", "train", "validation", "test", "prompt tokens", "completion tokens", "longest"];
    let mut lines: Vec<Vec<String>> = vec![head.map(str::to_owned).to_vec()];
    for r in reports {
        let numbers = [r.rows, r.train, r.validation, r.test, r.prompt_tokens, r.completion_tokens, r.longest as u64];
        lines.push([printable(&r.task), r.format.to_owned()].into_iter().chain(numbers.map(grouped)).collect());
    }
    let widths: Vec<usize> =
        (0..head.len()).map(|i| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        for (i, cell) in line.iter().enumerate() {
            let (cell, width) = (cell.as_str(), widths[i]);
            text += &match i {
                0 => format!("{cell:<width$}"),
                1 => format!("  {cell:<width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        text.push('\n');
    }
    for r in reports {
        let task = printable(&r.task);
        if r.truncated > 0 {
            text += &format!(
                "{task}: {} completions are cut at train.max_length and lose their end of text\n",
                grouped(r.truncated)
            );
        }
        if r.leaked > 0 {
            text += &format!("{task}: {} training rows are also in its file of held-out rows\n", grouped(r.leaked));
        }
        if r.dropped > 0 {
            text += &format!("{task}: {} rows dropped, the first:\n", grouped(r.dropped));
            r.bad.iter().for_each(|bad| text += &format!("  {}\n", printable(bad)));
        }
    }
    text
}

/// A row: the prompt as it is, each completion token by itself. Without `colour`, tokens stand in ⟦ ⟧.
pub fn row(example: &Example, task: &str, tokenizer: &TextTokenizer, colour: bool) -> String {
    let in_gap = |at: usize| example.gaps.iter().any(|gap| gap.contains(&(at as u32)));
    let shown: Vec<bool> = (0..example.tokens.len()).map(|at| at >= example.prompt as usize && !in_gap(at)).collect();
    let completion = shown.iter().filter(|&&shown| shown).count();
    let mut text = format!(
        "{} · row {} · {} prompt + {completion} completion tokens\n",
        printable(task),
        example.row,
        shown.len() - completion,
    );
    let pieces: Vec<String> = tokenizer.pieces(&example.tokens).iter().map(|p| printable(p)).collect();
    let mut at = 0;
    for run in shown.chunk_by(|a, b| a == b) {
        let (begin, end) = (at, at + run.len());
        at = end;
        if !run[0] {
            let prompt: String = pieces[begin..end].concat();
            text += &if colour { format!("{DIM}{prompt}{RESET}") } else { prompt };
            continue;
        }
        for (index, (piece, &id)) in pieces[begin..end].iter().zip(&example.tokens[begin..end]).enumerate() {
            // A line end is a token's, so it shows inside of it.
            let piece = piece.replace('\n', "⏎\n");
            text += &match colour {
                true if id == tokenizer.eos() => format!("{END}{piece}{RESET}"),
                true => format!("{}{piece}{RESET}", COMPLETION[index % 2]),
                false => format!("⟦{piece}⟧"),
            };
        }
    }
    text.push('\n');
    text
}

/// The same for scripts.
pub fn row_json(example: &Example, task: &str, tokenizer: &TextTokenizer) -> Value {
    let pieces = tokenizer.pieces(&example.tokens);
    let tokens: Vec<Value> = (example.tokens.iter().zip(pieces).enumerate())
        .map(|(i, (id, text))| json!({"id": id, "text": text, "target": example.asks(i)}))
        .collect();
    json!({"event": "row", "task": task, "row": example.row, "prompt_tokens": example.prompt, "tokens": tokens})
}

/// Without the control characters that would drive a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{FFFD}' } else { c }).collect()
}

/// 1,234,567
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).expect("digits are ASCII")).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::super::tests::model;
    use super::*;

    fn example() -> (tempfile::TempDir, TextTokenizer, Example) {
        let dir = tempfile::tempdir().unwrap();
        model(dir.path(), 100);
        let tokenizer = TextTokenizer::read(dir.path(), 100).unwrap();
        (dir, tokenizer, Example { task: 0, row: 7, tokens: [1, 5, 6, 0].into(), prompt: 2, gaps: Box::default() })
    }

    #[test]
    fn the_mask_and_the_end_of_text_are_visible() {
        let (_dir, tokenizer, example) = example();
        let plain = row(&example, "t\x1b[31m", &tokenizer, false);
        assert_eq!(plain, "t\u{FFFD}[31m · row 7 · 2 prompt + 2 completion tokens\n<s> w5⟦ w6⟧⟦ </s>⟧\n");
        let colour = row(&example, "t", &tokenizer, true);
        assert!(colour.ends_with("\x1b[2m<s> w5\x1b[0m\x1b[1;32m w6\x1b[0m\x1b[7;33m </s>\x1b[0m\n"), "{colour:?}");
        let json = row_json(&example, "t", &tokenizer);
        let targets: Vec<bool> = json["tokens"].as_array().unwrap().iter().map(|t| t["target"] == true).collect();
        assert_eq!(targets, [false, false, true, true]);
    }

    #[test]
    fn the_table_lines_up() {
        let report = Report {
            task: "gsm8k".into(),
            format: "messages",
            rows: 7473,
            train: 1_234_567,
            truncated: 2,
            ..Report::default()
        };
        let text = table(&[report]);
        let widths: Vec<usize> = text.lines().take(2).map(|l| l.chars().count()).collect();
        assert_eq!(widths[0], widths[1]);
        assert!(
            text.contains("gsm8k  messages  7,473  1,234,567") && text.contains("gsm8k: 2 completions are cut"),
            "{text}"
        );
    }
}
