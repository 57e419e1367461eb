//! Template files, examples before a prompt, and rows held out together, through the whole of reading.

use super::tests::{prepare, sentence, setup, tokens};
use super::*;
use std::collections::BTreeSet;
use unisono_configs::run::RunConfig;

const FILE: &str = "\
templates:
  a: !Template
    name: first
    answer_choices: w20 ||| w21
    jinja: 'w10 {{ q }} |||

      {{ answer_choices[n] }}'
  b: !Template
    name: second
    jinja: '{% if n %}w11 {{ q }}|||{{ [\"w30\", \"w31\"] | choice }}{% endif %}'
";

/// The rows' tokens with a template file, and the change that names one of its templates.
fn with_file(rows: &str, templates: &str, change: impl Fn(&mut RunConfig)) -> Vec<(Vec<u32>, u32)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("templates.yaml");
    std::fs::write(&path, templates).unwrap();
    tokens(rows, |config| {
        config.data[0].template_file = Some(path.clone());
        change(config);
    })
}

#[test]
fn one_template_of_a_file_is_chosen_by_name() {
    let rows = "{\"q\": \"w5\", \"n\": 1}\n{\"q\": \"w6\", \"n\": 0}";
    let first = with_file(rows, FILE, |c| c.data[0].template_name = Some("first".into()));
    assert_eq!(first, [(vec![1, 10, 5, 21, 0], 3), (vec![1, 10, 6, 20, 0], 3)]);
}

#[test]
fn without_a_name_one_that_applies_is_drawn_for_each_row_by_seed() {
    let rows: Vec<String> = (0..40).map(|i| format!("{{\"q\": \"w{}\", \"n\": {}}}", 40 + i, i % 2)).collect();
    let of = |seed: u64| with_file(&rows.join("\n"), FILE, |c| c.train.seed = seed);
    let (one, again, other) = (of(1), of(1), of(2));
    assert_eq!(one, again);
    assert_ne!(one, other);
    let kinds: BTreeSet<u32> = one.iter().map(|(tokens, _)| tokens[1]).collect();
    assert_eq!(kinds, BTreeSet::from([10, 11]));
    let drawn: BTreeSet<u32> = one.iter().filter(|(tokens, _)| tokens[1] == 11).map(|(tokens, _)| tokens[3]).collect();
    assert_eq!(drawn, BTreeSet::from([30, 31]), "choice draws both");
    // The second prints nothing where n is 0.
    assert!(one.iter().step_by(2).all(|(tokens, _)| tokens[1] == 10));
}

#[test]
fn what_is_wrong_with_a_template_file_is_one_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("templates.yaml");
    let say = |templates: &str, name: Option<&str>| {
        std::fs::write(&path, templates).unwrap();
        let said = sentence(r#"{"q": "w5", "n": 1}"#, |c| {
            (c.data[0].template_file, c.data[0].template_name) = (Some(path.clone()), name.map(str::to_owned));
        });
        said.replace(&format!("{}/", dir.path().display()), "")
    };
    assert_eq!(
        say(FILE, Some("third")),
        "templates.yaml: has no template \"third\"; set data.template_name to one of \"first\", \"second\""
    );
    assert_eq!(
        say("templates:\n  a:\n    name: x\n    jinja: '{% if %}'\n", None).split(": unexpected").next(),
        Some("templates.yaml: line 4: jinja of template \"x\" is not valid Jinja")
    );
    let endless = "templates:\n  a:\n    name: x\n    jinja: '{% for i in range(10 ** 9) %}{% for j in range(10 ** 9) %}{{ i }}{% endfor %}{% endfor %}|||'\n";
    assert!(say(endless, None).starts_with(
        "rows.jsonl:1: template \"x\" ran too long for this row (1000000 operations are the most); simplify it"
    ));
    let looping = "templates:\n  a:\n    name: x\n    jinja: '{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}|||'\n";
    assert!(say(looping, None).contains("template \"x\" failed: macros or loops are nested too deeply"));
    let growing = "templates:\n  a:\n    name: x\n    jinja: '{% set ns = namespace(s=\"x\") %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}|||'\n";
    assert!(say(growing, None).contains("ran too long"), "{}", say(growing, None));
    let printing = format!(
        "templates:\n  a:\n    name: x\n    jinja: '{{% for i in range(100000) %}}{}{{% endfor %}}|||'\n",
        "x".repeat(400)
    );
    assert!(say(&printing, None).contains("printed more than 16 MiB"), "{}", say(&printing, None));
    assert!(say("a: 1\n", None).contains("holds no \"templates\""));
}

#[test]
fn examples_come_from_the_training_split_and_are_never_the_row_itself() {
    let rows: Vec<String> =
        (10..90).map(|i| format!("{{\"prompt\": \"w{i}\", \"completion\": \" w{}\"}}", i + 1)).collect();
    let (_dir, mut config) = setup(&rows.join("\n"));
    (config.data[0].few_shot, config.split.validation, config.split.test) = (3, 0.1, 0.1);
    let data = prepare(&config, &()).unwrap();
    let prompt = |example: &Example| example.tokens[1..example.prompt as usize].to_vec();
    let own: BTreeSet<u32> = data.train.iter().map(|e| *prompt(e).last().unwrap()).collect();
    let mut drawn = BTreeSet::new();
    for example in data.train.iter().chain(&data.validation).chain(&data.test) {
        let prompt = prompt(example);
        assert_eq!(prompt.len(), 7, "three pairs and the row's own prompt");
        let examples: BTreeSet<u32> = prompt[..6].iter().step_by(2).copied().collect();
        assert_eq!(examples.len(), 3, "three different ones");
        assert!(examples.is_subset(&own), "examples are trained on");
        assert!(!examples.contains(prompt.last().unwrap()), "never the row itself");
        assert!(prompt[..6].chunks(2).all(|pair| pair[1] == pair[0] + 1));
        drawn.extend(examples);
    }
    assert!(drawn.len() > 50, "{} different rows are examples", drawn.len());
    config.train.seed = 1;
    assert_ne!(prepare(&config, &()).unwrap().train[0].tokens, data.train[0].tokens);
    let few = sentence(&rows[..3].join("\n"), |c| c.data[0].few_shot = 3);
    assert!(few.contains("only 2 other training rows can be examples, data.few_shot asks for 3"), "{few}");
}

#[test]
fn rows_of_a_group_and_completions_of_a_prompt_stay_together() {
    let rows: Vec<String> = (0..300)
        .map(|i| {
            format!("{{\"prompt\": \"w{}\", \"completion\": \"w{}\", \"id\": {}}}", 10 + i % 60, 10 + i % 77, i % 20)
        })
        .collect();
    let parts = |group_by: Option<&str>, of: &dyn Fn(u64) -> u64| {
        let (_dir, mut config) = setup(&rows.join("\n"));
        (config.split.validation, config.split.test) = (0.2, 0.2);
        config.data[0].group_by = group_by.map(str::to_owned);
        let data = prepare(&config, &()).unwrap();
        let keys = |examples: &[Example]| examples.iter().map(|e| of(e.row)).collect::<BTreeSet<u64>>();
        (keys(&data.train), keys(&data.validation), keys(&data.test))
    };
    for (train, validation, test) in [parts(None, &|row| row % 60), parts(Some("id"), &|row| row % 20)] {
        assert!(train.is_disjoint(&validation) && train.is_disjoint(&test) && validation.is_disjoint(&test));
        assert!(!train.is_empty() && !validation.is_empty() && !test.is_empty());
    }
    let missing = sentence(r#"{"prompt": "w5", "completion": "w6"}"#, |c| c.data[0].group_by = Some("id".into()));
    assert!(
        missing.contains("field \"id\" of data.group_by is missing; the row has \"prompt\", \"completion\""),
        "{missing}"
    );
}

#[test]
fn a_rendered_file_has_the_same_tokens() {
    let rows: Vec<String> = (0..60).map(|i| format!("{{\"q\": \"w{}\", \"n\": {}}}", 20 + i, i % 2)).collect();
    let (dir, mut config) = setup(&rows.join("\n"));
    let path = dir.path().join("templates.yaml");
    std::fs::write(&path, FILE).unwrap();
    (config.data[0].template_file, config.data[0].few_shot) = (Some(path), 2);
    (config.data[0].few_shot_delimiter, config.split.validation) = (" w3 ".into(), 0.2);
    let mut lines = String::new();
    let count = instructions::render(&config, &(), &mut |instruction| {
        if instruction.split == "train" {
            lines += &format!("{}\n", serde_json::to_string(&instruction).unwrap());
        }
        true
    });
    assert_eq!(count.unwrap(), instructions::Count { rendered: 60, dropped: 0 });
    let data = prepare(&config, &()).unwrap();
    assert!(!data.validation.is_empty());
    let whole: Vec<(Vec<u32>, u32)> = data.train.iter().map(|e| (e.tokens.to_vec(), e.prompt)).collect();
    assert_eq!(tokens(&lines, |_| ()), whole);
}
