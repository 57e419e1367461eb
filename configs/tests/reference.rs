//! `reference.toml` says every key with its meaning and default, as the doc comments of `src/run.rs` say them.
//! `UPDATE=1 cargo test -p unisono-configs --test reference` writes it anew.

use std::collections::BTreeMap;
use std::path::PathBuf;
use unisono_configs::run::{Checkpoint, Cluster, Data, Eval, Gate, Mix, Model, RunConfig, Split, Tokens, Train};

const HEAD: &str = "\
# Every key of a run's configuration with its default. Copy what you want to change: a file needs no more than
# model.path and one [[data]] table. Relative paths begin at the file; an unknown key is refused with the nearest known.
#
#     unisono train my.toml
#     unisono train my.toml --set train.epochs=3 --workers 2
#     unisono train --model models/tiny --data rows.jsonl          # without a file: all defaults
#
# Written by: UPDATE=1 cargo test -p unisono-configs --test reference
";

/// Values of keys that have no default; a comment mark before those that need not be set.
const EXAMPLES: &[(&str, &str)] = &[
    ("model.path", "\"models/tiny\""),
    ("data.path", "\"rows.jsonl\""),
    ("model.revision", "# \"main\""),
    ("data.revision", "# \"main\""),
    ("data.columns", "# { prompt = \"question\", completion = \"answer\" }"),
    ("data.name", "# \"rows\""),
    ("data.template", "# \"Question: {{ question }}\\nAnswer:||| {{ answer }}\""),
    ("data.template_file", "# \"templates.yaml\""),
    ("data.template_name", "# \"which-answer\""),
    ("data.group_by", "# \"id\""),
    ("data.validation", "# 0.05"),
    ("data.test", "# \"test.jsonl\""),
    ("tokens.cache", "# \"/scratch/tokens\""),
    ("checkpoint.copy_to", "# \"s3://bucket/runs\""),
    ("train.steps", "# 200"),
];

/// Fields of a struct or variants of an enum: name, type and doc comment.
type Members = Vec<(String, String, Vec<String>)>;

/// Every struct and enum of the source, with its own doc comment.
fn types(source: &str) -> BTreeMap<String, (Vec<String>, Members)> {
    let mut types = BTreeMap::new();
    let mut docs: Vec<String> = Vec::new();
    let mut open = None;
    for line in source.lines() {
        let text = line.trim();
        if let Some(doc) = text.strip_prefix("///") {
            docs.push(doc.trim().to_owned());
        } else if let Some(rest) = text.strip_prefix("pub struct ").or_else(|| text.strip_prefix("pub enum ")) {
            open = Some((rest.trim_end_matches(" {").to_owned(), std::mem::take(&mut docs), Members::new()));
        } else if text == "}" {
            if let Some((name, own, members)) = open.take() {
                types.insert(name, (own, members));
            }
        } else if !text.starts_with("#[") {
            if let Some((_, _, members)) = &mut open {
                let member = text.trim_start_matches("pub ").trim_end_matches(',');
                let (name, kind) = member.split_once(": ").unwrap_or((member, ""));
                members.push((name.to_owned(), kind.to_owned(), std::mem::take(&mut docs)));
            }
            docs.clear();
        }
    }
    types
}

/// PromptCompletion -> prompt-completion
fn kebab(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.extend(c.to_lowercase());
    }
    text
}

fn defaults() -> toml::Table {
    let data = Data {
        name: None,
        path: PathBuf::from("rows.jsonl"),
        revision: None,
        format: Default::default(),
        columns: BTreeMap::new(),
        template: None,
        template_file: None,
        template_name: None,
        delimiter: " ".into(),
        few_shot: 0,
        few_shot_delimiter: "\n\n".into(),
        group_by: None,
        roles_to_train: vec!["assistant".into()],
        turns: Default::default(),
        validation: None,
        test: None,
        on_bad_row: Default::default(),
        max_dropped: 0.01,
        weight: 1.0,
    };
    let config = RunConfig {
        model: Model { path: PathBuf::from("models/tiny"), revision: None, compute: Default::default() },
        data: vec![data],
        gate: Gate::default(),
        split: Split::default(),
        mix: Mix::default(),
        tokens: Tokens::default(),
        train: Train::default(),
        cluster: Cluster::default(),
        eval: Eval::default(),
        checkpoint: Checkpoint::default(),
    };
    config.to_toml().parse().expect("to_toml writes TOML")
}

fn reference() -> String {
    let sources = concat!(
        include_str!("../src/run.rs"),
        include_str!("../src/run/cluster.rs"),
        include_str!("../src/run/barriers.rs"),
        include_str!("../src/run/gate.rs"),
        include_str!("../src/run/rows.rs")
    );
    let types = types(sources);
    let defaults = defaults();
    let mut text = HEAD.to_owned();
    for (section, kind, _) in &types["RunConfig"].1 {
        let list = kind.starts_with("Vec<");
        let (own, members) = &types[kind.trim_start_matches("Vec<").trim_end_matches('>')];
        text += &format!("\n{}\n", if list { format!("[[{section}]]") } else { format!("[{section}]") });
        own.iter().for_each(|doc| text += &format!("# {doc}\n"));
        let values = match &defaults[section] {
            toml::Value::Array(tables) => tables[0].as_table(),
            value => value.as_table(),
        };
        let values = values.expect("a section is a table");
        for (key, kind, docs) in members {
            assert!(!docs.is_empty(), "{section}.{key} has no doc comment in src/run.rs");
            text.push('\n');
            docs.iter().for_each(|doc| text += &format!("# {doc}\n"));
            let variants = types.get(kind).map_or(&[][..], |(_, members)| members.as_slice());
            let words = !variants.iter().any(|(name, ..)| name.contains('('));
            for (name, _, docs) in variants.iter().filter(|_| words) {
                let doc = docs.join(" ");
                text += format!("#   \"{}\"{}{doc}\n", kebab(name), if doc.is_empty() { "" } else { ": " }).as_str();
            }
            let full = format!("{section}.{key}");
            text += &match (EXAMPLES.iter().find(|(name, _)| *name == full), values.get(key)) {
                (Some((_, example)), _) => match example.strip_prefix("# ") {
                    Some(example) => format!("# {key} = {example}\n"),
                    None => format!("{key} = {example}\n"),
                },
                (None, Some(toml::Value::Float(x))) if *x < 1e-3 => format!("{key} = {x:e}\n"),
                (None, Some(value)) => format!("{key} = {value}\n"),
                (None, None) => panic!("{full} has neither a default nor an example"),
            };
        }
    }
    text
}

fn configs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_reference_is_up_to_date() {
    let path = configs().join("reference.toml");
    let expected = reference();
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(found == expected, "run: UPDATE=1 cargo test -p unisono-configs --test reference");
}

#[test]
fn the_reference_says_the_defaults() {
    let config = RunConfig::read(&configs().join("reference.toml"), &[]).unwrap();
    assert_eq!((config.train, config.split), (Train::default(), Split::default()));
    assert_eq!((config.cluster, config.eval, config.checkpoint), Default::default());
}

#[test]
fn every_key_can_be_set_and_every_other_is_refused() {
    let text = reference();
    let mut section = String::new();
    for line in text.lines().filter(|l| !l.starts_with("# ") || l.contains(" = ") && l.split(' ').nth(2) == Some("=")) {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_matches(['[', ']']).to_owned();
        } else if let Some((key, value)) = line.trim_start_matches("# ").split_once(" = ") {
            let set = vec![(format!("{section}.{key}"), value.to_owned())];
            RunConfig::read(&configs().join("reference.toml"), &set).unwrap_or_else(|e| panic!("{e}"));
            let unknown = vec![(format!("{section}.x{key}x"), value.to_owned())];
            assert!(RunConfig::read(&configs().join("reference.toml"), &unknown).is_err(), "{section}.x{key}x");
        }
    }
}

#[test]
fn every_file_reads_and_opens_with_its_command() {
    let mut count = 0;
    for entry in std::fs::read_dir(configs()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "toml") || path.ends_with("Cargo.toml") {
            continue;
        }
        RunConfig::read(&path, &[]).unwrap_or_else(|e| panic!("{e}"));
        let text = std::fs::read_to_string(&path).unwrap();
        let head: String = text.lines().take_while(|l| l.starts_with('#')).collect();
        assert!(head.contains("unisono train"), "{} does not open with the command that runs it", path.display());
        count += 1;
    }
    assert!(count >= 2);
}
