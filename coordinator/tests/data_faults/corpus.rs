//! A clean corpus that can be spoiled, and what `unisono check` says of it.

use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

/// Rows of each task.
pub const ROWS: usize = 200;

/// splitmix64 (Steele, Lea, Flood 2014).
pub struct Numbers(pub u64);

impl Numbers {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % n
    }

    pub fn words(&mut self, count: usize) -> String {
        let syllables = ["ka", "lo", "mi", "ter", "sun", "pe", "ra", "dol", "fi", "gan", "ho", "bre"];
        let mut word = || -> String { (0..3).map(|_| syllables[self.below(12) as usize]).collect() };
        (0..count).map(|_| word()).collect::<Vec<_>>().join(" ")
    }
}

pub struct Table {
    pub name: &'static str,
    pub rows: Vec<(String, String)>,
    /// Further keys of its `[[data]]` table.
    pub keys: String,
}

/// A corpus to be spoiled, and what the configuration says beside it.
pub struct Corpus {
    pub tables: Vec<Table>,
    pub keys: String,
}

pub const LAST: usize = 0;
pub const ORDER: usize = 1;
pub const UPPER: usize = 2;

impl Corpus {
    pub fn clean() -> Self {
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

    pub fn rows(&mut self, table: usize) -> &mut Vec<(String, String)> {
        &mut self.tables[table].rows
    }

    /// Changes the rows with these indexes.
    pub fn change(
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
    pub fn write(&self, dir: &Path, model: &Path) -> PathBuf {
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
pub fn model() -> &'static Path {
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

pub fn unisono(args: &[&str], config: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_unisono")).args(args).arg("--").arg(config).output().unwrap()
}

/// What `unisono check --json` says.
pub struct Checked {
    pub code: Option<i32>,
    pub findings: Vec<Value>,
    pub tasks: Vec<Value>,
    pub stderr: String,
}

impl Checked {
    pub fn kinds(&self) -> Vec<(&str, &str)> {
        self.findings.iter().map(|f| (f["kind"].as_str().unwrap(), f["task"].as_str().unwrap())).collect()
    }
}

pub fn check(config: &Path) -> Checked {
    let output = unisono(&["check", "--json"], config);
    let lines = String::from_utf8(output.stdout).unwrap();
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |kind: &str| events.iter().filter(|e| e["event"] == kind).cloned().collect();
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Checked { code: output.status.code(), findings: of("finding"), tasks: of("task"), stderr }
}

pub fn checked(corpus: &Corpus) -> Checked {
    let dir = tempfile::tempdir().unwrap();
    check(&corpus.write(dir.path(), model()))
}
