//! Files in a temporary directory against a tiny word tokenizer: what comes out, and the sentence of each refusal.

use super::*;
use std::path::Path;
use unisono_configs::run::{Held, OnBadRow, RunConfig};

/// Token of the end of text, and of the beginning where the tokenizer has one.
const EOS: u32 = 0;
const BOS: u32 = 1;

/// A model directory whose tokenizer knows the words `w2` ... `w<vocab - 1>` and puts [`BOS`] before a text.
pub(super) fn model(dir: &Path, vocab: usize) {
    let words: Vec<String> = (2..vocab).map(|i| format!("\"w{i}\":{i}")).collect();
    let special = |id: u32, text: &str| {
        format!(
            r#"{{"id":{id},"content":"{text}","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}}"#
        )
    };
    let tokenizer = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{},{}],"normalizer":null,
        "pre_tokenizer":{{"type":"WhitespaceSplit"}},
        "post_processor":{{"type":"TemplateProcessing",
            "single":[{{"SpecialToken":{{"id":"<s>","type_id":0}}}},{{"Sequence":{{"id":"A","type_id":0}}}},{{"SpecialToken":{{"id":"</s>","type_id":0}}}}],
            "pair":[{{"Sequence":{{"id":"A","type_id":0}}}},{{"Sequence":{{"id":"B","type_id":1}}}}],
            "special_tokens":{{"<s>":{{"id":"<s>","ids":[1],"tokens":["<s>"]}},"</s>":{{"id":"</s>","ids":[0],"tokens":["</s>"]}}}}}},
        "decoder":null,"model":{{"type":"WordLevel","unk_token":"w2","vocab":{{"</s>":0,"<s>":1,{}}}}}}}"#,
        special(0, "</s>"),
        special(1, "<s>"),
        words.join(",")
    );
    std::fs::write(dir.join("tokenizer.json"), tokenizer).unwrap();
    let config = r#"{"model_type":"llama","vocab_size":VOCAB,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,
        "num_attention_heads":2,"num_key_value_heads":1,"max_position_embeddings":64,"eos_token_id":[0,5],"rms_norm_eps":1e-5}"#;
    std::fs::write(dir.join("config.json"), config.replace("VOCAB", &vocab.to_string())).unwrap();
}

/// A configuration over one table with the given rows.
pub(super) fn setup(rows: &str) -> (tempfile::TempDir, RunConfig) {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 100);
    std::fs::write(dir.path().join("rows.jsonl"), rows).unwrap();
    let text = "[model]\npath = \".\"\n[[data]]\npath = \"rows.jsonl\"\n[split]\nvalidation = 0\ntest = 0\n[train]\nmax_length = 16\n";
    std::fs::write(dir.path().join("run.toml"), text).unwrap();
    let mut config = RunConfig::read(&dir.path().join("run.toml"), &[]).unwrap();
    config.tokens.cache_gib = 0.0;
    (dir, config)
}

/// Every row as it is trained on or held out.
#[derive(Debug, PartialEq)]
pub(super) struct Loaded {
    pub(super) tasks: Vec<String>,
    pub(super) eos: u32,
    pub(super) train: Vec<Example>,
    pub(super) validation: Vec<Example>,
    pub(super) test: Vec<Example>,
    pub(super) reports: Vec<Report>,
}

pub(super) fn prepare(config: &RunConfig, progress: &dyn Progress) -> Result<Loaded, Error> {
    let loaded = |dataset: Dataset| {
        let rows = 0..dataset.train_rows() as u32;
        let train = rows.filter_map(|row| dataset.example(row).transpose()).collect::<Result<_, _>>()?;
        let reports = dataset.reports();
        let Dataset { tasks, eos, validation, test, .. } = dataset;
        Ok(Loaded { tasks, eos, train, validation, test, reports })
    };
    let all = super::prepare(config, Extent::All, progress).and_then(loaded)?;
    // Whether rows are tokenized when they are asked for or before makes no difference.
    let mut later = config.clone();
    later.tokens.ahead_above_mib = 0.0;
    let mut ahead = super::prepare(&later, Extent::Start, progress).and_then(loaded)?;
    for (report, other) in ahead.reports.iter_mut().zip(&all.reports) {
        // What is wrong with a row is told when it is judged.
        report.bad.clone_from(&other.bad);
    }
    assert_eq!(ahead, all);
    Ok(all)
}

pub(super) fn sentence(rows: &str, change: impl Fn(&mut RunConfig)) -> String {
    let (dir, mut config) = setup(rows);
    change(&mut config);
    let text = prepare(&config, &()).unwrap_err().to_string();
    text.replace(&format!("{}/", dir.path().display()), "")
}

pub(super) fn tokens(rows: &str, change: impl Fn(&mut RunConfig)) -> Vec<(Vec<u32>, u32)> {
    let (_dir, mut config) = setup(rows);
    change(&mut config);
    prepare(&config, &()).unwrap().train.iter().map(|e| (e.tokens.to_vec(), e.prompt)).collect()
}

#[test]
fn the_prompt_has_special_tokens_and_the_completion_one_end_of_text() {
    let rows = "{\"prompt\": \"w5 w6\", \"completion\": \"w7\"}\r\n\n{\"completion\": \"w8 </s>\", \"prompt\": \"\"}";
    assert_eq!(tokens(rows, |_| ()), [(vec![BOS, 5, 6, 7, EOS], 3), (vec![BOS, 8, EOS], 1)]);
}

#[test]
fn a_text_is_all_completion() {
    assert_eq!(tokens(r#"{"text": "w5 w6", "id": 3}"#, |_| ()), [(vec![BOS, 5, 6, EOS], 1)]);
}

#[test]
fn a_template_reaches_into_lists_and_objects() {
    let template = |c: &mut RunConfig| c.data[0].template = Some("{{ a.text[1] }}|||{{ a['of'].x }}".into());
    assert_eq!(tokens(r#"{"a": {"text": ["w5", "w6"], "of": {"x": "w7"}}}"#, template), [(vec![BOS, 6, 7, EOS], 2)]);
}

#[test]
fn columns_may_have_other_names() {
    let named = |c: &mut RunConfig, pairs: &[(&str, &str)]| {
        c.data[0].columns = pairs.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
    };
    let rows = r#"{"question": "w5", "prompt": "w9", "answer": "w6"}"#;
    let both = |c: &mut RunConfig| named(c, &[("prompt", "question"), ("completion", "answer")]);
    assert_eq!(tokens(rows, both), [(vec![BOS, 5, 6, EOS], 2)]);
    let missing = sentence(r#"{"question": "w5", "answers": "w6"}"#, both);
    assert!(
        missing.starts_with(r#"rows.jsonl:1: field "answer" is missing; the row has "question", "answers""#),
        "{missing}"
    );
    let (dir, mut config) = setup(
        r#"{"dialog": [{"speaker": "user", "text": "w5", "role": "x"}, {"speaker": "assistant", "text": [{"type": "text", "text": "w6"}]}]}"#,
    );
    std::fs::write(
        dir.path().join("chat_template.jinja"),
        "{% for m in messages %}{{ m.content }} {{ 'w9' if m.role == 'user' }} {% endfor %}",
    )
    .unwrap();
    named(&mut config, &[("messages", "dialog"), ("role", "speaker"), ("content", "text")]);
    let dataset = prepare(&config, &()).unwrap();
    assert_eq!((&*dataset.train[0].tokens, dataset.train[0].prompt), (&[5, 9, 6][..], 2));
}

#[test]
fn a_template_cuts_at_its_own_separator_only() {
    let template =
        |c: &mut RunConfig| c.data[0].template = Some("{{ q }} w9 ||| {{ a }}{% if n > 1 %} w10{% endif %}\n".into());
    let rows = r#"{"q": "w5 ||| w6", "a": "w7", "n": 2}"#;
    assert_eq!(tokens(rows, template), [(vec![BOS, 5, 2, 6, 9, 7, 10, EOS], 5)]);
}

#[test]
fn templates_written_for_python_run() {
    let template = |c: &mut RunConfig| {
        c.data[0].template = Some(
            "{{ q.strip().split(' ')[-1] }}|||{{ {0: 'w7', 1: 'w8'}[label] }} {{ q.replace('w5', 'w9') | trim }}"
                .into(),
        );
    };
    assert_eq!(tokens(r#"{"q": " w5 w6 ", "label": 1}"#, template), [(vec![BOS, 6, 8, 9, 6, EOS], 2)]);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn no_file_panics(
        rows in proptest::collection::vec("(\\{\"prompt\": ?.{0,6}, ?\"completion\": ?(\"w[0-9]{1,3}\"|.{0,6})\\}|.{0,12}|\\[{0,200})", 1..6),
        bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..40),
        cut in 0..40usize,
    ) {
        let mut text = rows.join("\n").into_bytes();
        let at = cut.min(text.len());
        text.splice(at..at, bytes);
        let (dir, mut config) = setup("");
        std::fs::write(dir.path().join("rows.jsonl"), text).unwrap();
        let _ = prepare(&config, &());
        config.data[0].on_bad_row = OnBadRow::Drop;
        config.data[0].max_dropped = 1.0;
        let _ = prepare(&config, &());
        config.data[0].template = Some("{{ prompt }}|||{{ completion.x }}".into());
        let _ = prepare(&config, &());
    }
}

#[test]
fn a_cut_completion_loses_its_end_of_text() {
    let (_dir, mut config) = setup(r#"{"prompt": "w5 w6", "completion": "w7 w8 w9"}"#);
    config.train.max_length = 5;
    let dataset = prepare(&config, &()).unwrap();
    assert_eq!(&*dataset.train[0].tokens, [BOS, 5, 6, 7, 8]);
    assert_eq!((dataset.reports[0].truncated, dataset.train[0].targets(), dataset.train[0].inputs()), (1, 2, 4));
}

#[test]
fn dropped_rows_are_counted_and_shown() {
    let rows = "{\"prompt\":\"w5\",\"completion\":\"w6\"}\n{\"prompt\":\"w5\",\"completion\":\" \"}\nnonsense\n";
    let (_dir, mut config) = setup(rows);
    config.data[0].on_bad_row = OnBadRow::Drop;
    config.data[0].max_dropped = 0.7;
    let report = prepare(&config, &()).unwrap().reports.remove(0);
    assert_eq!((report.rows, report.train, report.dropped, report.bad.len()), (3, 1, 2, 2));
    assert!(report.bad[0].ends_with("rows.jsonl:2: the completion is empty"), "{}", report.bad[0]);
    let refused = sentence(rows, |c| c.data[0].on_bad_row = OnBadRow::Drop);
    assert!(
        refused.starts_with("rows.jsonl: 2 of 3 rows cannot be used, more than data.max_dropped = 0.01"),
        "{refused}"
    );
}

#[test]
fn bad_rows_are_refused_in_a_sentence() {
    let good = "{\"prompt\":\"w5\",\"completion\":\"w6\"}\n";
    let remedy = "; correct the row, or set data.on_bad_row = \"drop\"";
    let cases = [
        ("{\"prompt\":\"w5\" \"completion\":\"w6\"}", "rows.jsonl:2:16: malformed JSON: expected `,` or `}`"),
        ("{\"prompt\":\"w5\",", "rows.jsonl:2:15: malformed JSON: the line ends inside the object; write one whole object per line"),
        ("[1]", "rows.jsonl:2: the row is not a JSON object; write one object per line"),
        ("{\"prompt\":\"w5\",\"completion\":\"\"}", "rows.jsonl:2: the completion is empty"),
        ("{\"prompt\":\"w5\",\"completion\":\"</s>\"}", "rows.jsonl:2: the completion has no token but the end of text"),
        ("{\"prompt\":5,\"completion\":\"w6\"}", "rows.jsonl:2: field \"prompt\" is a number, but must be a string"),
        (
            "{\"question\":\"w5\",\"answer\":\"w6\"}",
            "rows.jsonl:2: field \"prompt\" is missing; the row has \"question\", \"answer\"; set data.columns = { prompt = \"question\", completion = \"answer\" }, or data.template",
        ),
        (
            "{\"prompt\":\"w5 w5 w5 w5 w5 w5 w5 w5 w5 w5 w5 w5 w5 w5 w5 w5\",\"completion\":\"w6\"}",
            "rows.jsonl:2: the prompt fills the whole length (17 tokens, train.max_length = 16) and leaves no completion token; raise train.max_length, or set data.on_bad_row = \"drop\"",
        ),
    ];
    for (row, expected) in cases {
        let remedy = if expected.contains("on_bad_row") { "" } else { remedy };
        assert_eq!(sentence(&format!("{good}{row}\n{good}"), |_| ()), format!("{expected}{remedy}"));
    }
    let two = sentence(&format!("{good}{{}}\n{{}}\n"), |_| ());
    assert!(two.contains("(line 3 is bad, too); correct"), "{two}");
    let three = sentence(&format!("{good}{}", "{}\n".repeat(3)), |_| ());
    assert!(three.contains("(3 of 4 rows are bad, lines 3 and 4 among them); correct"), "{three}");
    let all = sentence(&"{}\n".repeat(3), |_| ());
    assert!(all.ends_with("of them (all 3 rows are bad)"), "{all}");
    // Where no row is good, something else than the rows is at fault.
    let long = format!("{{\"prompt\":\"{}\",\"completion\":\"w6\"}}\n", "w5 ".repeat(20)).repeat(2);
    let full = sentence(&long, |_| ());
    assert!(full.ends_with("(all 2 rows are bad); raise train.max_length"), "{full}");
    let grouped = sentence(good, |c| c.data[0].group_by = Some("id".into()));
    assert!(grouped.ends_with("; correct data.group_by"), "{grouped}");
    let shots = sentence(&good.repeat(2), |c| c.data[0].few_shot = 3);
    assert!(shots.ends_with("; lower data.few_shot"), "{shots}");
    let commas = sentence("q,a\n1,2\n", |_| ());
    assert!(commas.ends_with("are read: convert it"), "{commas}");
}

#[test]
fn templates_are_refused_in_a_sentence() {
    let row = "{\"q\": \"w5\", \"a\": null, \"n\": 3}";
    let with = |template: &str| sentence(row, |c| c.data[0].template = Some(template.into()));
    assert_eq!(with("{{ q }}"), "data table \"rows\": the template has no |||; put ||| between prompt and completion");
    let syntax = with("{{ q }|||x");
    assert!(syntax.starts_with("data table \"rows\": the template is not valid Jinja: "), "{syntax}");
    assert_eq!(
        with("{{ q }}|||{{ answer }}"),
        "rows.jsonl:1: field \"answer\" of the template is missing; the row has \"q\", \"a\", \"n\"; correct the row, or data.template"
    );
    assert_eq!(
        with("{{ q }}|||{{ a }}"),
        "rows.jsonl:1: field \"a\" of the template is null; correct the row, or data.template"
    );
    assert_eq!(
        with("{% if n == 2 %}|||{% endif %}w5"),
        "rows.jsonl:1: the template printed no ||| for this row; correct the row, or data.template"
    );
    assert_eq!(
        with("w5|||w6|||w7"),
        "rows.jsonl:1: the template printed more than one ||| for this row; correct the row, or data.template"
    );
    let endless = with("|||{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}");
    assert_eq!(endless, "rows.jsonl:1: the template ran too long for this row; correct the row, or data.template");
    let wide = with("|||{% for i in range(5000) %}{{ 'a' * 9000 }}{% endfor %}");
    assert_eq!(
        wide,
        "rows.jsonl:1: the template printed more than 16 MiB for this row; correct the row, or data.template"
    );
}

#[test]
fn files_are_refused_in_a_sentence() {
    let row = "{\"prompt\":\"w5\",\"completion\":\"w6\"}\n";
    assert_eq!(sentence("\n \n", |_| ()), "rows.jsonl: has no rows; write one JSON object per line");
    assert!(sentence("[{}]", |_| ()).starts_with("rows.jsonl:1: field \"prompt\" is missing"));
    assert!(sentence("PAR1", |_| ()).starts_with("rows.jsonl: is a damaged Parquet file"));
    let missing = sentence(row, |c| c.data[0].path.set_file_name("absent.jsonl"));
    assert_eq!(
        missing,
        "absent.jsonl: cannot be read (No such file or directory (os error 2)); set data.path to an existing file"
    );
    let twice = sentence(row, |c| c.data.push(c.data[0].clone()));
    assert_eq!(twice, "data table \"rows\": two tables have this name; set data.name");
    let all = sentence(
        &(0..12).map(|i| format!("{{\"prompt\":\"w{i}\",\"completion\":\"w6\"}}\n")).collect::<String>(),
        |c| c.split.test = 1.0,
    );
    assert!(all.contains("no row is left to train on"), "{all}");
}

#[test]
fn a_vocabulary_that_does_not_match_is_refused() {
    let (dir, config) = setup("{\"prompt\":\"w5\",\"completion\":\"w6\"}\n");
    let path = dir.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"vocab_size\":100", "\"vocab_size\":50")).unwrap();
    let sentence = prepare(&config, &()).unwrap_err().to_string();
    assert!(sentence.contains("the tokenizer has 100 tokens, but config.json says vocab_size = 50"), "{sentence}");
}

#[test]
fn rows_are_numbered_over_all_tables_and_held_out_files_count() {
    let rows = |from: usize| -> String {
        (from..from + 20).map(|i| format!("{{\"prompt\":\"w{i}\",\"completion\":\"w6\"}}\n")).collect()
    };
    let (dir, mut config) = setup(&rows(10));
    std::fs::write(dir.path().join("held.jsonl"), rows(25)).unwrap();
    std::fs::write(dir.path().join("second.jsonl"), rows(50)).unwrap();
    config.data[0].validation = Some(Held::File(dir.path().join("held.jsonl")));
    let mut second = config.data[0].clone();
    second.path = dir.path().join("second.jsonl");
    second.validation = Some(Held::Share(0.2));
    config.data.push(second);
    let dataset = prepare(&config, &()).unwrap();
    assert_eq!(dataset.tasks, ["rows", "second"]);
    let (first, second) = (&dataset.reports[0], &dataset.reports[1]);
    assert_eq!((first.rows, first.train, first.validation, first.leaked), (40, 20, 20, 5));
    assert!(second.validation >= 1 && second.train + second.validation == 20);
    let mut all: Vec<u64> = dataset.train.iter().chain(&dataset.validation).map(|e| e.row).collect();
    all.sort_unstable();
    assert!(all.iter().copied().eq(0..60));
    assert!(dataset.train.iter().filter(|e| e.task == 1).all(|e| e.row >= 40));
}

#[test]
fn the_result_does_not_depend_on_the_number_of_threads() {
    let rows: String =
        (0..5000).map(|i| format!("{{\"prompt\":\"w{} w7\",\"completion\":\"w{}\"}}\n", i % 89, i % 83)).collect();
    let (_dir, mut config) = setup(&rows);
    config.split.validation = 0.1;
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| prepare(&config, &()).unwrap())
    };
    let (one, three) = (on(1), on(3));
    assert_eq!((one.train, one.validation, one.reports), (three.train, three.validation, three.reports));
}

#[test]
fn a_row_longer_than_the_model_is_refused() {
    let words = |n: usize| format!("{{\"prompt\":\"w5\",\"completion\":\"{}\"}}\n", "w6 ".repeat(n));
    // The beginning of the text, the prompt, 62 words and the end of the text: 64 of the 65 tokens are fed.
    let (_dir, mut config) = setup(&words(62));
    config.train.max_length = 100;
    assert_eq!(prepare(&config, &()).unwrap().train[0].inputs(), 64);
    assert_eq!(
        sentence(&words(63), |c| c.train.max_length = 100),
        "rows.jsonl:1: the row has 66 tokens, but config.json says max_position_embeddings = 64; set train.max_length = 64"
    );
}

#[test]
fn tokenizers_are_refused_in_a_sentence() {
    let (dir, config) = setup("{\"prompt\":\"w5\",\"completion\":\"w6\"}\n");
    let path = |name: &str| dir.path().join(name);
    let refused = || prepare(&config, &()).unwrap_err().to_string().replace(&format!("{}/", dir.path().display()), "");
    let text = std::fs::read_to_string(path("config.json")).unwrap();
    std::fs::write(path("config.json"), text.replace("\"eos_token_id\":[0,5],", "")).unwrap();
    assert_eq!(
        refused(),
        "config.json: no end-of-text token is known; set \"eos_token_id\" in config.json, or \"eos_token\" in tokenizer_config.json"
    );
    std::fs::write(path("tokenizer_config.json"), r#"{"eos_token": {"content": "<eos>"}}"#).unwrap();
    assert_eq!(
        refused(),
        "tokenizer_config.json: eos_token \"<eos>\" is not in tokenizer.json; copy both from the same model"
    );
    std::fs::write(path("tokenizer_config.json"), r#"{"eos_token": "w9"}"#).unwrap();
    assert_eq!(prepare(&config, &()).unwrap().eos, 9);
    std::fs::write(path("generation_config.json"), r#"{"eos_token_id": [7, 8]}"#).unwrap();
    assert_eq!(prepare(&config, &()).unwrap().train[0].tokens.last(), Some(&7));
    std::fs::write(path("generation_config.json"), r#"{"eos_token_id": 100}"#).unwrap();
    assert!(
        refused().starts_with("tokenizer.json: the end-of-text token is 100, but config.json says vocab_size = 100")
    );
    std::fs::write(path("tokenizer.json"), "{").unwrap();
    assert!(refused().starts_with("tokenizer.json: not a tokenizer ("), "{}", refused());
    std::fs::remove_file(path("tokenizer.json")).unwrap();
    assert!(refused().starts_with("tokenizer.json: cannot be read (No such file"), "{}", refused());
}

#[test]
fn rows_of_other_formats_are_found_out() {
    let (dir, mut config) = setup("[{\"instruction\": \"w5\", \"input\": \"w6\", \"output\": \"w7\"},\n {\"instruction\": \"w8\", \"output\": \"w9\"}]\n");
    config.train.max_length = 60;
    let dataset = prepare(&config, &()).unwrap();
    assert_eq!((dataset.reports[0].format, dataset.train.len()), ("alpaca", 2));
    assert_eq!(dataset.train[1].tokens[dataset.train[1].prompt as usize..], [9, EOS]);
    // A template of words, each turn ending in the end of text; its white space is the tokenizer's.
    let template = "{{ bos_token }}{% for m in messages %} {{ m.content }} {{ eos_token if m.role == 'assistant' else 'w9' }}{% endfor %}";
    let tokens = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    let chat = r#"{"messages": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}, {"role": "user", "content": "w5"}]}"#;
    let from = r#"{"conversations": [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w6"}, {"from": "human", "value": "w7"}, {"from": "gpt", "value": "w8"}]}"#;
    let columns = r#"{"prompt": [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}, {"role": "user", "content": "w7"}], "completion": [{"role": "assistant", "content": "w8"}]}"#;
    let path = dir.path().join("rows.jsonl");
    std::fs::write(&path, chat).unwrap();
    let none = prepare(&config, &()).unwrap_err().to_string();
    assert!(none.contains("its rows are conversations, but") && none.contains("chat_template.jinja"), "{none}");
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), tokens).unwrap();
    for (row, format, asked) in [
        (chat, "messages", vec![6, EOS, 8, EOS]),
        (from, "sharegpt", vec![6, EOS, 8, EOS]),
        (columns, "prompt-completion of messages", vec![8, EOS]),
        (
            &columns.replace(r#"[{"role": "assistant", "content": "w8"}]"#, r#""w8""#),
            "prompt-completion of messages",
            vec![8, EOS],
        ),
    ] {
        std::fs::write(&path, row).unwrap();
        let dataset = prepare(&config, &()).unwrap();
        let example = &dataset.train[0];
        // What follows the last turn that is trained on teaches nothing.
        assert_eq!(*example.tokens, [BOS, 5, 9, 6, EOS, 7, 9, 8, EOS], "{format}");
        assert_eq!(dataset.reports[0].format, format);
        let found: Vec<u32> =
            (0..example.tokens.len()).filter(|&at| example.asks(at)).map(|at| example.tokens[at]).collect();
        assert_eq!(found, asked, "{format}");
        assert_eq!(example.targets(), asked.len(), "{format}");
    }
    std::fs::write(&path, format!("{chat}\n{from}\n")).unwrap();
    let mixed = prepare(&config, &()).unwrap_err().to_string();
    assert!(mixed.contains("line 1 looks like messages, line 2 like sharegpt; set data.format"), "{mixed}");
    // Cut in the middle of the second turn, and before the first.
    std::fs::write(&path, chat).unwrap();
    config.train.max_length = 8;
    let dataset = prepare(&config, &()).unwrap();
    assert_eq!((dataset.train[0].tokens.len(), dataset.reports[0].truncated), (8, 1));
    config.train.max_length = 3;
    let full = prepare(&config, &()).unwrap_err().to_string();
    assert!(full.contains("rows.jsonl:1: the prompt fills the whole length"), "{full}");
}
