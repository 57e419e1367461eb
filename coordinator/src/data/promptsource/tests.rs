//! Against promptsource itself: `goldens/promptsource.py` writes down what its `Template.apply` gives.

use super::*;
use serde_json::Value as Json;
use std::collections::{BTreeMap, BTreeSet};

fn row(json: &str) -> Row<'_> {
    serde_json::from_str(json).unwrap()
}

/// What is wrong with one case, if something is. Python's errors must be ours.
fn judge(template: &Template, row: &str, outputs: &[Json], whole: bool, seeds: u64) -> Option<String> {
    let row = self::row(row);
    let mut seen = BTreeSet::new();
    for seed in 0..seeds {
        let ours = template.apply(&row, row.hash(), seed);
        let json = ours.as_ref().map_or(Json::Null, |parts| serde_json::json!(parts));
        if !outputs.contains(&json) && whole {
            return Some(format!("ours {ours:?}\n    theirs {}", serde_json::json!(outputs)));
        }
        seen.insert(json.to_string());
    }
    (seeds > 1 && seen.len() < outputs.len()).then(|| format!("draws only {} of {} outputs", seen.len(), outputs.len()))
}

#[test]
#[ignore = "needs PROMPTSOURCE_CASES, written by goldens/promptsource.py --all"]
fn every_template_of_promptsource_renders_alike() {
    let cases = std::env::var("PROMPTSOURCE_CASES").expect("set PROMPTSOURCE_CASES");
    let mut files: BTreeMap<String, TemplateFile> = BTreeMap::new();
    let (mut count, mut same, mut strict, mut failed) = (0, 0, 0, 0);
    for line in std::fs::read_to_string(cases).unwrap().lines() {
        let case: Json = serde_json::from_str(line).unwrap();
        let path = case["file"].as_str().unwrap();
        if !files.contains_key(path) {
            files.insert(path.into(), TemplateFile::read(Path::new(path)).unwrap_or_else(|error| panic!("{error}")));
        }
        let name = case["template"].as_str().unwrap();
        let template = files[path].templates.iter().find(|t| t.name == name).unwrap();
        let outputs = case["outputs"].as_array().unwrap();
        count += 1;
        match judge(template, &case["row"].to_string(), outputs, case["whole"] == true, 1) {
            None => same += 1,
            // Python gives up where we go on: not what a row of a real data set does.
            Some(problem) if outputs.iter().all(Json::is_null) => {
                strict += 1;
                println!("Python gives up: {name}: {problem}");
            }
            Some(problem) => {
                failed += 1;
                if failed <= 40 {
                    println!("{path}: {name}\n    row {}\n    {problem}", case["row"]);
                }
            }
        }
    }
    let templates: usize = files.values().map(|file| file.templates.len()).sum();
    println!("{} files, {templates} templates; {count} cases, {same} alike, {strict} where only Python gives up, {failed} different", files.len());
    assert_eq!(failed, 0);
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/promptsource")
}

/// goldens/promptsource.py refuses a fixture that lacks a feature which promptsource's own templates use.
#[test]
fn every_feature_of_promptsources_templates_renders_to_its_bytes() {
    let file = TemplateFile::read(&goldens().join("templates.yaml")).unwrap();
    let rows = std::fs::read_to_string(goldens().join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().collect();
    let golden = std::fs::read_to_string(goldens().join("golden.jsonl")).unwrap();
    let (mut problems, mut rendered) = (Vec::new(), 0);
    for line in golden.lines() {
        let case: Json = serde_json::from_str(line).unwrap();
        let name = case["template"].as_str().unwrap();
        let number = case["row"].as_u64().unwrap() as usize;
        let template = file.templates.iter().find(|t| t.name == name).unwrap();
        let outputs = case["outputs"].as_array().unwrap();
        rendered += usize::from(!outputs.contains(&Json::Null));
        problems
            .extend(judge(template, rows[number], outputs, true, 300).map(|p| format!("{name}, row {number}: {p}")));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert_eq!(golden.lines().count(), file.templates.len() * rows.len());
    assert!(rendered >= golden.lines().count() * 3 / 4, "only {rendered} goldens are no errors");
}

#[test]
#[ignore = "a measurement: cargo test --release -p unisono-coordinator --lib promptsource -- --ignored --nocapture speed"]
fn speed_of_one_core() {
    let file = TemplateFile::read(&goldens().join("templates.yaml")).unwrap();
    let rows = std::fs::read_to_string(goldens().join("rows.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().collect();
    // Seconds that this thread had a core, whatever else runs.
    let busy = || -> f64 {
        let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        stat.split(' ').next().unwrap().parse::<f64>().unwrap() / 1e9
    };
    let (begin, mut count) = (busy(), 0u32);
    while busy() - begin < 1.0 {
        for template in &file.templates {
            let row = self::row(rows[count as usize % rows.len()]);
            let _ = std::hint::black_box(template.apply(&row, row.hash(), 0));
            count += 1;
        }
    }
    let speed = f64::from(count) / (busy() - begin);
    println!("{speed:.0} rows a second, JSON and hash included, over {} templates", file.templates.len());
    assert!(speed > 10_000.0);
}
