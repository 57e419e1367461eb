//! Faults seeded into a clean corpus, each named by `unisono check` before a worker starts; and the clean corpus, of which
//! it has nothing to say.

#![allow(clippy::unwrap_used)]

mod corpus;
mod seeded;

use corpus::{check, checked, model, unisono, Corpus, Numbers, LAST, ROWS, UPPER};
use seeded::FAULTS;
use serde_json::{json, Value};

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
