//! `reference.toml` says what the code does: every key, with its default.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use unisono_configs::run::RunConfig;

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("reference.toml")
}

#[test]
fn it_shows_the_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let short = dir.path().join("short.toml");
    let base = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (model, data) = (base.join("models/tiny"), base.join("rows.jsonl"));
    let text = format!("[model]\npath = \"{}\"\n\n[[data]]\npath = \"{}\"\n", model.display(), data.display());
    std::fs::write(&short, text).unwrap();
    let (short, full) = (RunConfig::read(&short, &[]).unwrap(), RunConfig::read(&reference(), &[]).unwrap());
    assert_eq!(short, full);
}

#[test]
fn it_shows_every_key_commented_or_not() {
    let text = std::fs::read_to_string(reference()).unwrap();
    let commented: Vec<&str> = text.lines().map(|line| line.trim_start_matches("# ")).collect();
    let all: String = commented
        .iter()
        .filter(|line| line.contains(" = ") || line.starts_with('['))
        .map(|line| format!("{line}\n"))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.toml");
    std::fs::write(&path, all).unwrap();
    let config = RunConfig::read(&path, &[]).unwrap();
    let resolved: toml::Table = config.to_toml().parse().unwrap();
    let mut sections: Vec<(&str, &toml::Value)> = resolved.iter().map(|(name, value)| (name.as_str(), value)).collect();
    for (name, section) in &mut sections {
        let table = section.as_array().map_or(*section, |list| &list[0]);
        for key in table.as_table().unwrap().keys() {
            let shown = commented.iter().any(|line| line.starts_with(&format!("{key} = ")));
            assert!(shown, "reference.toml does not show {name}.{key}");
        }
    }
    // What is optional was set by a comment.
    assert!(config.train.steps.is_some() && config.data[0].template.is_some() && config.data[0].name.is_some());
    assert!(config.data[0].validation.is_some() && config.data[0].test.is_some());
}
