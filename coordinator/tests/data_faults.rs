//! Faults seeded into a clean corpus, each named by `unisono check` before a worker starts; and the clean corpus, of which
//! it has nothing to say.

#![allow(clippy::unwrap_used)]

use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Rows of each task.
const ROWS: usize = 200;

/// splitmix64 (Steele, Lea, Flood 2014).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }

    fn words(&mut self, count: usize) -> String {
        let syllables = ["ka", "lo", "mi", "ter", "sun", "pe", "ra", "dol", "fi", "gan", "ho", "bre"];
        let mut word = || -> String { (0..3).map(|_| syllables[self.below(12) as usize]).collect() };
        (0..count).map(|_| word()).collect::<Vec<_>>().join(" ")
    }
}

struct Table {
    name: &'static str,
    rows: Vec<(String, String)>,
    /// Further keys of its `[[data]]` table.
    keys: String,
}

/// A corpus to be spoiled, and what the configuration says beside it.
struct Corpus {
    tables: Vec<Table>,
    keys: String,
}

const LAST: usize = 0;
const ORDER: usize = 1;
const UPPER: usize = 2;

impl Corpus {
    fn clean() -> Self {
        let mut numbers = Numbers(7);
        let mut lines = |count| -> Vec<String> { (0..ROWS).map(|_| numbers.words(count)).collect() };
        let last = |line: String| {
            let answer = format!(" {}", line.split(' ').next_back().unwrap_or_default());
            (format!("What is the last word of this line?\n{line}\nAnswer:"), answer)
        };
        let order = |(i, line): (usize, String)| {
            let answer = if i % 3 == 0 { " yes" } else { " no" };
            (format!("Are these words in their order? {line}\nAnswer:"), answer.to_owned())
        };
        let upper = |line: String| {
            (format!("Write this in capital letters: {line}\nAnswer:"), format!(" {}", line.to_uppercase()))
        };
        let table = |name, rows| Table { name, rows, keys: String::new() };
        let tables = vec![
            table("last", lines(12).into_iter().map(last).collect()),
            table("order", lines(9).into_iter().enumerate().map(order).collect()),
            table("upper", lines(10).into_iter().map(upper).collect()),
        ];
        Corpus { tables, keys: String::new() }
    }

    fn rows(&mut self, table: usize) -> &mut Vec<(String, String)> {
        &mut self.tables[table].rows
    }

    /// Changes the rows with these indexes.
    fn change(
        &mut self,
        table: usize,
        rows: impl IntoIterator<Item = usize>,
        change: impl Fn(&mut String, &mut String),
    ) {
        for row in rows {
            let (prompt, completion) = &mut self.tables[table].rows[row];
            change(prompt, completion);
        }
    }

    /// Writes files and configuration into `dir`.
    fn write(&self, dir: &Path, model: &Path) -> PathBuf {
        let mut text = format!("[model]\npath = \"{}\"\n", model.display());
        for table in &self.tables {
            let file = dir.join(format!("{}.jsonl", table.name));
            let rows: String =
                table.rows.iter().map(|(p, c)| format!("{}\n", json!({"prompt": p, "completion": c}))).collect();
            std::fs::write(&file, rows).unwrap();
            text += &format!("[[data]]\nname = \"{}\"\npath = \"{}\"\n{}\n", table.name, file.display(), table.keys);
        }
        let config = dir.join("run.toml");
        std::fs::write(&config, text + &self.keys).unwrap();
        config
    }
}

/// A model directory with a tokenizer, made once.
fn model() -> &'static Path {
    static MODEL: OnceLock<tempfile::TempDir> = OnceLock::new();
    let dir = MODEL.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let clean = Corpus::clean();
        clean.write(dir.path(), Path::new("absent"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_unisono"));
        command.arg("init-model").arg(dir.path().join("model")).arg("--data");
        command.args(clean.tables.iter().map(|t| dir.path().join(format!("{}.jsonl", t.name))));
        command.args(["--vocab", "600", "--layers", "1", "--hidden", "32", "--heads", "2"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        dir
    });
    Box::leak(Box::new(dir.path().join("model")))
}

fn unisono(args: &[&str], config: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unisono")).args(args).arg("--").arg(config).output().unwrap()
}

/// What `unisono check --json` says.
struct Checked {
    code: Option<i32>,
    findings: Vec<Value>,
    tasks: Vec<Value>,
    stderr: String,
}

impl Checked {
    fn kinds(&self) -> Vec<(&str, &str)> {
        self.findings.iter().map(|f| (f["kind"].as_str().unwrap(), f["task"].as_str().unwrap())).collect()
    }
}

fn check(config: &Path) -> Checked {
    let output = unisono(&["check", "--json"], config);
    let lines = String::from_utf8(output.stdout).unwrap();
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| events.iter().filter(|e| e["event"] == kind).cloned().collect();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Checked { code: output.status.code(), findings: of("finding"), tasks: of("task"), stderr }
}

fn checked(corpus: &Corpus) -> Checked {
    let dir = tempfile::tempdir().unwrap();
    check(&corpus.write(dir.path(), model()))
}

#[test]
fn a_clean_corpus_raises_no_alarm() {
    let found = checked(&Corpus::clean());
    assert_eq!((found.code, found.findings.as_slice()), (Some(0), &[][..]), "{}", found.stderr);
    assert_eq!(found.tasks.len(), 3);
}

#[test]
fn the_demo_s_corpus_raises_no_alarm() {
    let dir = tempfile::tempdir().unwrap();
    let files = unisono::demo::corpus::Corpus::new(0).write(dir.path()).unwrap();
    let mut text = format!("[model]\npath = \"{}\"\n", model().display());
    for ((task, rows), held) in files.tasks.iter().zip(&files.validation) {
        let (rows, held) = (rows.display(), held.display());
        text += &format!("[[data]]\nname = \"{task}\"\npath = \"{rows}\"\nvalidation = \"{held}\"\ntest = 0\n");
    }
    let config = dir.path().join("run.toml");
    std::fs::write(&config, text).unwrap();
    let found = check(&config);
    let alarms: Vec<&Value> = found.findings.iter().filter(|f| f["severity"] != "note").collect();
    assert!(found.code == Some(0) && alarms.is_empty(), "{alarms:?} {}", found.stderr);
    assert_eq!(found.tasks.len(), 8);
}

/// What is deliberate is no fault: a format that all rows of a task share.
#[test]
fn the_words_of_an_instruction_format_in_every_row_raise_no_alarm() {
    let mut corpus = Corpus::clean();
    corpus.change(UPPER, 0..ROWS, |prompt, _| *prompt = format!("### Instruction:\n{prompt}\n\n### Response:\n"));
    assert_eq!(checked(&corpus).kinds(), []);
}

struct Fault {
    name: &'static str,
    seed: fn(&mut Corpus),
    kind: &'static str,
    task: &'static str,
    /// Line of the first place.
    line: u64,
    /// Findings that the fault brings along.
    beside: &'static [&'static str],
}

const FAULTS: &[Fault] = &[
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

#[test]
fn every_seeded_fault_is_named_with_its_task_and_place() {
    let mut wrong = Vec::new();
    for fault in FAULTS {
        let mut corpus = Corpus::clean();
        (fault.seed)(&mut corpus);
        let found = checked(&corpus);
        let named = found.findings.iter().find(|f| f["kind"] == fault.kind && f["task"] == fault.task);
        let place = named.map(|f| f["places"][0].as_str().unwrap_or_default().to_owned()).unwrap_or_default();
        let ending = format!("{}.jsonl:{}", fault.task, fault.line);
        let placed = fault.line == 0 || place.split(' ').next().is_some_and(|p| p.ends_with(&ending));
        let strangers = found.kinds().into_iter().any(|(kind, _)| kind != fault.kind && !fault.beside.contains(&kind));
        let warned = named.is_some_and(|f| f["severity"] == "warning");
        if !warned || !placed || strangers || found.code != Some(0) {
            wrong.push(format!("{}: {:?} at \"{place}\" {}", fault.name, found.kinds(), found.stderr));
        }
    }
    assert!(FAULTS.len() >= 15 && wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_is_refused_ends_a_run_before_a_worker_starts() {
    let dir = tempfile::tempdir().unwrap();
    let mut corpus = Corpus::clean();
    // The rows held out are rows trained on.
    let held: String =
        (corpus.rows(LAST)[..10].iter()).map(|(p, c)| format!("{}\n", json!({"prompt": p, "completion": c}))).collect();
    std::fs::write(dir.path().join("held.jsonl"), held).unwrap();
    corpus.tables[LAST].keys = "validation = \"held.jsonl\"\ntest = 0\n".into();
    let config = corpus.write(dir.path(), model());
    let found = check(&config);
    assert_eq!(found.code, Some(2), "{}", found.stderr);
    assert_eq!(found.findings[0]["kind"], "identical-split");
    assert_eq!(found.findings[0]["severity"], "error");
    assert!(found.stderr.contains("identical-split in task \"last\""), "{}", found.stderr);

    let run = dir.path().join("run");
    let run_dir = format!("--run-dir={}", run.display());
    let output = unisono(&["coordinator", "--listen", "127.0.0.1:0", &run_dir], &config);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("refused identical-split") && said.contains("set gate.identical_split = \"warn\""), "{said}");
    assert!(!run.exists(), "a refused run left {}", run.display());

    let warned = unisono(&["check", "--set", "gate.identical_split=warn"], &config);
    assert_eq!(warned.status.code(), Some(0), "{}", String::from_utf8_lossy(&warned.stderr));
    assert_eq!(unisono(&["check", "--set", "gate.identical_split=warn", "--strict"], &config).status.code(), Some(2));
}

#[test]
fn a_fault_that_is_switched_off_is_not_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut corpus = Corpus::clean();
    corpus.change(LAST, 0..ROWS, |_, completion| completion.push_str("</s>"));
    corpus.keys = "[gate]\nend_of_text = \"off\"\n".into();
    assert_eq!(checked(&corpus).kinds(), []);
    corpus.keys = "[gate]\nend_of_text = \"refuse\"\n".into();
    let config = corpus.write(dir.path(), model());
    assert_eq!(check(&config).code, Some(2));
    // Below the share that matters it is a note, even to the strict.
    corpus = Corpus::clean();
    corpus.change(LAST, [3], |_, completion| completion.push_str("</s>"));
    corpus.keys = "[gate]\nend_of_text = \"refuse\"\nrare = 0.01\n".into();
    let found = checked(&corpus);
    assert_eq!((found.code, found.findings[0]["severity"].as_str()), (Some(0), Some("note")));
}

#[test]
fn a_turn_that_never_ends_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(model()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let template = |end: &str| {
        let text = format!("{{% for m in messages %}}{{{{ m.role }}}}: {{{{ m.content }}}}{end}{{% endfor %}}");
        std::fs::write(dir.path().join("chat_template.jinja"), text).unwrap();
    };
    let mut numbers = Numbers(3);
    let rows: String = (0..60)
        .map(|_| {
            let (asked, said) = (numbers.words(9), numbers.words(9));
            let messages = json!([{"role": "user", "content": asked}, {"role": "assistant", "content": said}]);
            format!("{}\n", json!({ "messages": messages }))
        })
        .collect();
    std::fs::write(dir.path().join("talk.jsonl"), rows).unwrap();
    let config = dir.path().join("run.toml");
    std::fs::write(&config, "[model]\npath = \".\"\n[[data]]\npath = \"talk.jsonl\"\n").unwrap();
    template("\n");
    assert_eq!(check(&config).kinds(), [("missing-eos", "talk")]);
    template("<|endoftext|>\n");
    assert_eq!(check(&config).kinds(), []);
}

#[test]
fn a_bad_row_is_refused_by_its_place_and_one_in_a_hundred_thousand_can_be_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let config = Corpus::clean().write(dir.path(), model());
    let path = dir.path().join("last.jsonl");
    let clean = std::fs::read(&path).unwrap();
    let long = "kalomi ".repeat(2000);
    let fills = json!({"prompt": long, "completion": " x"}).to_string();
    for (name, row, word) in [
        ("an empty completion", br#"{"prompt": "a", "completion": " "}"#.as_slice(), "empty"),
        ("malformed JSON", br#"{"prompt": "a", "completion": "#, "JSON"),
        ("bytes that are not UTF-8", b"{\"prompt\": \"\xFF\", \"completion\": \"b\"}", "UTF-8"),
        ("a missing field", br#"{"prompt": "a"}"#, "completion"),
        ("a field of the wrong type", br#"{"prompt": 1, "completion": "b"}"#, "must be a string"),
        ("a prompt that fills the length", fills.as_bytes(), "fills the whole length"),
        ("nothing but the end of text", br#"{"prompt": "a", "completion": "<|endoftext|>"}"#, "end of text"),
    ] {
        std::fs::write(&path, [clean.as_slice(), row, b"\n"].concat()).unwrap();
        let found = check(&config);
        assert_eq!(found.code, Some(2), "{name}: {}", found.stderr);
        assert!(found.stderr.contains("last.jsonl:201") && found.stderr.contains(word), "{name}: {}", found.stderr);
        assert_eq!(found.stderr.lines().count(), 1, "{name}: {}", found.stderr);
    }
    let mut numbers = Numbers(5);
    let mut rows = String::new();
    for row in 0..100_000 {
        let answer = numbers.words(1);
        match row {
            77_777 => rows += "{\"prompt\": \"a\", \"completion\": \"\"}\n",
            _ => {
                rows += &format!(
                    "{{\"prompt\": \"{} {row}\\nAnswer:\", \"completion\": \" {answer}\"}}\n",
                    numbers.words(2)
                )
            }
        }
    }
    std::fs::write(&path, rows).unwrap();
    let output = unisono(&["check", "--json", "--set", "data.0.on_bad_row=drop"], &config);
    let lines = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let task: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!((task["rows"].as_u64(), task["dropped"].as_u64()), (Some(100_000), Some(1)));
    assert!(task["bad"][0].as_str().unwrap().contains("last.jsonl:77778"), "{task}");
}
