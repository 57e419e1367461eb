//! The faults: how each is seeded, and how it is to be named.

use super::corpus::{Corpus, Numbers, Table, LAST, ORDER, ROWS, UPPER};

pub struct Fault {
    pub name: &'static str,
    pub seed: fn(&mut Corpus),
    pub kind: &'static str,
    pub task: &'static str,
    /// Line of the first place.
    pub line: u64,
    /// Findings that the fault brings along.
    pub beside: &'static [&'static str],
}

pub const FAULTS: &[Fault] = &[
    Fault {
        name: "the end of text is written out in every completion",
        seed: |c| c.change(LAST, 0..ROWS, |_, completion| completion.push_str("<|endoftext|>")),
        kind: "end-of-text",
        task: "last",
        line: 1,
        beside: &[],
    },
    Fault {
        name: "another model's end of text is written out in some completions",
        seed: |c| c.change(LAST, [4, 9], |_, completion| completion.push_str("</s>")),
        kind: "end-of-text",
        task: "last",
        line: 5,
        beside: &[],
    },
    Fault {
        name: "a special token stands in prompts",
        seed: |c| c.change(LAST, [7, 8], |prompt, _| prompt.insert_str(0, "<|pad|>")),
        kind: "special-tokens",
        task: "last",
        line: 8,
        beside: &[],
    },
    Fault {
        name: "rows rendered for another model's chat template",
        seed: |c| c.change(UPPER, 20..30, |prompt, _| prompt.insert_str(0, "<|user|>\n")),
        kind: "template-drift",
        task: "upper",
        line: 21,
        beside: &[],
    },
    Fault {
        name: "rows in the words of another instruction format",
        seed: |c| c.change(UPPER, 30..36, |prompt, _| prompt.insert_str(0, "### Instruction:\n")),
        kind: "template-drift",
        task: "upper",
        line: 31,
        beside: &[],
    },
    Fault {
        name: "a template that was not rendered",
        seed: |c| c.change(UPPER, [2, 3], |prompt, _| *prompt = prompt.replace("this in", "{{ line }} in")),
        kind: "unrendered-template",
        task: "upper",
        line: 3,
        beside: &[],
    },
    Fault {
        name: "a space too many at the end of some prompts",
        seed: |c| c.change(LAST, [11, 12, 13], |prompt, _| prompt.push(' ')),
        kind: "uneven-seam",
        task: "last",
        line: 12,
        beside: &[],
    },
    Fault {
        name: "completions glued to their prompts",
        seed: |c| {
            c.change(ORDER, 0..ROWS, |prompt, completion| {
                *prompt = prompt.trim_end_matches(':').to_owned();
                *completion = completion.trim().to_owned();
            });
        },
        kind: "glued-seam",
        task: "order",
        line: 1,
        beside: &[],
    },
    Fault {
        name: "prompts that are empty",
        seed: |c| c.change(LAST, [30, 31], |prompt, _| prompt.clear()),
        kind: "empty-turns",
        task: "last",
        line: 31,
        beside: &[],
    },
    Fault {
        name: "completions that repeat their prompt",
        seed: |c| c.change(LAST, [40, 41], |prompt, completion| *completion = format!(" {prompt}{completion}")),
        kind: "prompt-echo",
        task: "last",
        line: 41,
        beside: &[],
    },
    Fault {
        name: "text decoded with the wrong encoding",
        seed: |c| c.change(LAST, [50, 51], |prompt, _| prompt.insert_str(0, "It â€™s said: ")),
        kind: "broken-text",
        task: "last",
        line: 51,
        beside: &[],
    },
    Fault {
        name: "control characters",
        seed: |c| c.change(LAST, [60], |prompt, _| prompt.insert(0, '\u{8}')),
        kind: "broken-text",
        task: "last",
        line: 61,
        beside: &[],
    },
    Fault {
        name: "rows that occur twice",
        seed: |c| {
            let copies = c.rows(LAST)[..6].to_vec();
            c.rows(LAST).extend(copies);
        },
        kind: "duplicates",
        task: "last",
        line: 201,
        beside: &[],
    },
    Fault {
        name: "rows that differ in white space and case only",
        seed: |c| {
            let copies: Vec<_> =
                c.rows(LAST)[..6].iter().map(|(p, a)| (p.replace("What is", "what  is"), a.clone())).collect();
            c.rows(LAST).extend(copies);
        },
        kind: "near-duplicates",
        task: "last",
        line: 201,
        beside: &["split-leak"],
    },
    Fault {
        name: "rows that are also in another task",
        seed: |c| {
            let copies = c.rows(LAST)[..10].to_vec();
            c.rows(ORDER).extend(copies);
        },
        kind: "repeated-across-tasks",
        task: "order",
        line: 201,
        beside: &["shared-sources", "split-leak"],
    },
    Fault {
        name: "missing values as answers",
        seed: |c| c.change(LAST, [70, 71], |_, completion| *completion = " nan".into()),
        kind: "placeholder-answers",
        task: "last",
        line: 71,
        beside: &[],
    },
    Fault {
        name: "one prompt with several answers",
        seed: |c| {
            let prompt = c.rows(LAST)[80].0.clone();
            c.change(LAST, 81..85, move |p, _| p.clone_from(&prompt));
        },
        kind: "shared-prompts",
        task: "last",
        line: 81,
        beside: &["split-leak"],
    },
    Fault {
        name: "a task that answers one thing only",
        seed: |c| c.change(ORDER, 0..ROWS, |_, completion| *completion = " yes".into()),
        kind: "single-label",
        task: "order",
        line: 1,
        beside: &[],
    },
    Fault {
        name: "a task that nearly always answers the same",
        seed: |c| c.change(ORDER, 2..ROWS, |_, completion| *completion = " no".into()),
        kind: "skewed-labels",
        task: "order",
        line: 2,
        beside: &[],
    },
    Fault {
        name: "answers in several spellings",
        seed: |c| c.change(ORDER, [3, 6], |_, completion| *completion = " Yes.".into()),
        kind: "label-variants",
        task: "order",
        line: 4,
        beside: &[],
    },
    Fault {
        name: "a task too small to hold a row out",
        seed: |c| c.rows(ORDER).truncate(6),
        kind: "small-split",
        task: "order",
        line: 0,
        beside: &[],
    },
    Fault {
        name: "questions about one passage on both sides of the split",
        seed: |c| {
            let mut numbers = Numbers(99);
            let passages: Vec<String> = (0..50).map(|_| numbers.words(30)).collect();
            for (i, row) in c.rows(UPPER).iter_mut().enumerate() {
                let asked = numbers.words(4);
                *row = (format!("{}\nQuestion: {asked}?\nAnswer:", passages[i / 4]), format!(" {}", numbers.words(2)));
            }
        },
        kind: "split-leak",
        task: "upper",
        line: 0,
        beside: &[],
    },
    Fault {
        name: "two templates of one data set, each split by itself",
        seed: |c| {
            let again = |(prompt, answer): &(String, String)| {
                let line = prompt.lines().nth(1).unwrap_or_default();
                (format!("{line}\nWhich word does the line above end with?"), answer.clone())
            };
            let rows = c.rows(LAST).iter().map(again).collect();
            c.tables.push(Table { name: "again", rows, keys: String::new() });
        },
        kind: "shared-sources",
        task: "last",
        line: 1,
        beside: &["split-leak"],
    },
    Fault {
        name: "completions that are cut",
        seed: |c| {
            c.keys = "[train]\nmax_length = 256\n".into();
            c.change(LAST, 100..115, |_, completion| completion.push_str(&" word".repeat(300)));
        },
        kind: "truncated",
        task: "last",
        line: 101,
        beside: &[],
    },
    Fault {
        name: "an end of text in the midst of completions",
        seed: |c| c.change(LAST, [120], |_, completion| completion.push_str("<|endoftext|> and more words than three")),
        kind: "doubled-eos",
        task: "last",
        line: 121,
        beside: &["end-of-text"],
    },
];
