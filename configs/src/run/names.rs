//! The names of the configuration's keys, and what other trainers call them.

use super::tree::{Document, Node, Value};
use super::Error;

/// Every section with its keys, in the order of the reference file.
pub(super) const KEYS: &[(&str, &[&str])] = &[
    ("model", &["path", "revision", "compute"]),
    (
        "data",
        &[
            "name",
            "path",
            "revision",
            "format",
            "columns",
            "template",
            "template_file",
            "template_name",
            "delimiter",
            "few_shot",
            "few_shot_delimiter",
            "group_by",
            "roles_to_train",
            "turns",
            "validation",
            "test",
            "on_bad_row",
            "max_dropped",
            "weight",
        ],
    ),
    ("gate", super::gate::KEYS),
    ("split", &["validation", "test"]),
    ("mix", &["by", "cap", "temperature", "unit", "examples"]),
    ("tokens", &["ahead_above_mib", "cache", "cache_gib"]),
    (
        "train",
        &[
            "epochs",
            "steps",
            "global_batch_size",
            "micro_batches",
            "max_length",
            "max_tokens_per_micro_batch",
            "learning_rate",
            "schedule",
            "warmup_steps",
            "weight_decay",
            "betas",
            "eps",
            "max_grad_norm",
            "optimizer_state",
            "shuffle",
            "seed",
            "spike_mads",
            "on_spike",
            "on_bad_numbers",
            "spike_window",
        ],
    ),
    (
        "cluster",
        &[
            "workers",
            "threads_per_worker",
            "device",
            "zero_stage",
            "recompute",
            "offload",
            "assignment",
            "transport",
            "peer_timeout",
            "heartbeat",
            "lease",
            "hang_after",
            "rejoin_timeout",
            "restarts",
            "token_hours",
            "token_uses",
        ],
    ),
    ("eval", &["every"]),
    ("checkpoint", &["every", "snapshot_every", "keep", "grace", "copy_to"]),
];

/// Keys that are planned: refused, but not as unknown.
const PLANNED: &[&str] = &["eval.generate", "model.adapter", "model.freeze"];

/// Other trainers' names (TRL, transformers, Axolotl, DeepSpeed) of a key that takes the same value.
const RENAMED: &[(&str, &str)] = &[
    ("model_name_or_path", "model.path"),
    ("base_model", "model.path"),
    ("model_id", "model.path"),
    ("model_revision", "model.revision"),
    ("dataset_revision", "data.revision"),
    ("num_train_epochs", "train.epochs"),
    ("num_epochs", "train.epochs"),
    ("max_steps", "train.steps"),
    ("lr", "train.learning_rate"),
    ("batch_size", "train.global_batch_size"),
    ("train_batch_size", "train.global_batch_size"),
    ("max_seq_length", "train.max_length"),
    ("max_seq_len", "train.max_length"),
    ("sequence_len", "train.max_length"),
    ("model_max_length", "train.max_length"),
    ("cutoff_len", "train.max_length"),
    ("lr_scheduler_type", "train.schedule"),
    ("lr_scheduler", "train.schedule"),
    ("warmup_ratio", "train.warmup_steps"),
    ("adam_epsilon", "train.eps"),
    ("gradient_clipping", "train.max_grad_norm"),
    ("data_seed", "train.seed"),
    ("val_set_size", "split.validation"),
    ("eval_steps", "eval.every"),
    ("evals_per_epoch", "eval.every"),
    ("save_steps", "checkpoint.every"),
    ("saves_per_epoch", "checkpoint.every"),
    ("save_total_limit", "checkpoint.keep"),
    ("nproc_per_node", "cluster.workers"),
    ("num_processes", "cluster.workers"),
    ("world_size", "cluster.workers"),
];

/// Names of things that are set elsewhere, always so, or not at all.
const EXPLAINED: &[(&str, &str)] = &[
    ("datasets", "write one [[data]] table with a path per task"),
    ("dataset_name", "write a [[data]] table with its name as path"),
    ("train_file", "write a [[data]] table with the path of a .jsonl file"),
    ("test_datasets", "set data.validation or data.test to a file"),
    ("output_dir", "give --run-dir DIR on the command line"),
    ("logging_dir", "give --run-dir DIR on the command line"),
    ("resume_from_checkpoint", "give --resume RUN on the command line"),
    ("adam_beta1", "set train.betas = [beta1, beta2]"),
    ("adam_beta2", "set train.betas = [beta1, beta2]"),
    ("optim", "remove it: the optimizer is AdamW"),
    ("optimizer", "remove it: the optimizer is AdamW"),
    ("fp16", "set model.compute = \"bf16\" or \"fp32\"; fp16 is not supported"),
    ("tf32", "remove it: fp32 arithmetic is always exact fp32"),
    ("lora", "remove it: adapters are not supported yet, all weights are trained"),
    ("qlora", "remove it: adapters are not supported yet, all weights are trained"),
    ("peft", "remove it: adapters are not supported yet, all weights are trained"),
    ("load_in_8bit", "remove it: all weights are trained, in model.compute"),
    ("load_in_4bit", "remove it: all weights are trained, in model.compute"),
    ("adapter", "remove it: adapters are not supported yet, all weights are trained"),
    ("use_peft", "remove it: adapters are not supported yet, all weights are trained"),
    ("lora_r", "remove it: adapters are not supported yet, all weights are trained"),
    ("lora_alpha", "remove it: adapters are not supported yet, all weights are trained"),
    ("lora_dropout", "remove it: adapters are not supported yet, all weights are trained"),
    ("lora_target_modules", "remove it: adapters are not supported yet, all weights are trained"),
    ("packing", "remove it: rows are always packed, without padding and without seeing each other"),
    ("sample_packing", "remove it: rows are always packed, without padding and without seeing each other"),
    ("pad_to_sequence_len", "remove it: rows are always packed, without padding"),
    ("group_by_length", "remove it: rows are always packed, without padding"),
    ("train_on_inputs", "remove it: the loss is on completion tokens only"),
    ("completion_only_loss", "remove it: the loss is on completion tokens only"),
    ("assistant_only_loss", "remove it: the loss is on completion tokens only"),
    ("gradient_checkpointing", "remove it: cluster.recompute decides what the backward pass computes again"),
    ("deepspeed", "remove it: cluster.zero_stage decides how state is sharded"),
    ("fsdp", "remove it: cluster.zero_stage decides how state is sharded"),
    ("fsdp_config", "remove it: cluster.zero_stage decides how state is sharded"),
    ("flash_attention", "remove it: attention is chosen by the device"),
    ("attn_implementation", "remove it: attention is chosen by the device"),
    ("torch_compile", "remove it: nothing is compiled at run time"),
    ("logging_steps", "remove it: every step is logged"),
    ("report_to", "remove it: give --json for one event per line"),
    ("wandb_project", "remove it: give --json for one event per line"),
    ("dataloader_num_workers", "remove it: rows are tokenized once, before training"),
    ("dataset_num_proc", "remove it: rows are tokenized once, on all cores"),
    ("dataset_prepared_path", "remove it: rows are tokenized once, before training"),
    ("dataset_text_field", "set data.columns = { text = \"column\" }"),
    ("field_messages", "set data.columns = { messages = \"column\" }"),
    ("message_property_mappings", "set data.columns = { role = \"name\", content = \"name\" }"),
    ("chat_template", "remove it: model.path has the chat template, in chat_template.jinja or tokenizer_config.json"),
    ("chat_template_jinja", "remove it: put the file into model.path as chat_template.jinja"),
    ("chat_template_path", "remove it: put the file into model.path as chat_template.jinja"),
    ("tokenizer_type", "remove it: model.path has tokenizer.json"),
    ("model_type", "remove it: model.path has config.json"),
    ("trust_remote_code", "remove it: no code is ever loaded"),
    ("special_tokens", "remove it: model.path has the tokens"),
];

/// What another trainer's key is here, where it is no key: what to do instead, or why nothing is to be done.
pub fn explanation(key: &str) -> Option<&'static str> {
    EXPLAINED.iter().find(|(name, _)| *name == key).map(|(_, text)| *text)
}

/// Batch sizes per device and their multiplier.
const PER_DEVICE: &[&str] = &["per_device_train_batch_size", "micro_batch_size", "train_micro_batch_size_per_gpu"];
const ACCUMULATION: &[&str] = &["gradient_accumulation_steps"];

/// Refuses the first key, in the order of the file, that the configuration does not have.
pub(super) fn check(document: &Document) -> Result<(), Error> {
    for (section, node) in &document.root {
        let known = KEYS.iter().find(|(name, _)| name == section);
        let Some((_, keys)) = known else { return Err(unknown(document, None, section, node)) };
        let tables: Vec<&Node> = match &node.value {
            Value::Array(list) => list.iter().collect(),
            _ => vec![node],
        };
        for table in tables {
            let Value::Table(entries) = &table.value else { continue };
            if let Some((key, node)) = entries.iter().find(|(key, _)| !keys.contains(&key.as_str())) {
                return Err(unknown(document, Some(section), key, node));
            }
        }
    }
    Ok(())
}

fn unknown(document: &Document, section: Option<&str>, key: &str, node: &Node) -> Error {
    let field = section.map_or(key.to_owned(), |section| format!("{section}.{key}"));
    let problem = if PLANNED.contains(&field.as_str()) {
        "is not supported yet; remove it".to_owned()
    } else {
        foreign(document, section, key, node).unwrap_or_else(|| near(section, key))
    };
    document.error(&node.place, &field, problem)
}

/// Refuses an option that sets `key` of no section.
pub(super) fn without_section(document: &Document, key: &str, node: &Node) -> Error {
    let example = || "names no section; write --set section.key=value, for example --set train.epochs=2".to_owned();
    document.error(&node.place, key, foreign(document, None, key, node).unwrap_or_else(example))
}

/// The exact translation of another trainer's key.
fn foreign(document: &Document, section: Option<&str>, key: &str, node: &Node) -> Option<String> {
    let alike = key.replace('-', "_").to_lowercase();
    let key = alike.as_str();
    if PER_DEVICE.contains(&key) || ACCUMULATION.contains(&key) {
        return Some(global_batch(document, key));
    }
    if matches!(key, "bf16" | "bfloat16" | "dtype" | "torch_dtype") {
        let wants = !matches!(&node.value, Value::Flag(false)) && !node.show().contains("float32");
        return Some(format!("set model.compute = \"{}\"", if wants { "bf16" } else { "fp32" }));
    }
    if let Some((_, to)) = RENAMED.iter().find(|(from, _)| *from == key) {
        return Some(translate(key, to, node));
    }
    if let Some((_, text)) = EXPLAINED.iter().find(|(from, _)| *from == key) {
        return Some((*text).to_owned());
    }
    // Our own name, in another section.
    let homes: Vec<&str> = KEYS.iter().filter(|(_, keys)| keys.contains(&key)).map(|(name, _)| *name).collect();
    match homes.as_slice() {
        [home] if section != Some(home) => {
            Some(format!("belongs to another section; set {home}.{key} = {}", node.show()))
        }
        _ => None,
    }
}

fn translate(key: &str, to: &str, node: &Node) -> String {
    match (key, node.number()) {
        ("warmup_ratio", Some(share)) if share < 1.0 => format!("set {to} = {share} (below 1: a share of the steps)"),
        ("evals_per_epoch" | "saves_per_epoch", _) => format!("set {to} = steps of an epoch / {}", node.show()),
        ("eval_steps" | "save_steps", Some(share)) if share < 1.0 => {
            format!("set {to} = {share} x the number of steps")
        }
        ("max_steps", Some(n)) if n <= 0.0 => format!("remove it: without {to}, train.epochs decides"),
        ("val_set_size", Some(n)) if n >= 1.0 => format!("set {to} to a share of the rows, for example 0.05"),
        ("lr_scheduler_type" | "lr_scheduler", _) => match &node.value {
            Value::Text(word) if word == "constant_with_warmup" => format!("set {to} = \"constant\""),
            Value::Text(word) if word == "warmup_stable_decay" => format!("set {to} = \"wsd\""),
            Value::Text(word) if !["cosine", "linear", "constant"].contains(&word.as_str()) => {
                format!("set {to} = \"cosine\", \"linear\", \"constant\" or \"wsd\"; \"{word}\" is not supported")
            }
            _ => format!("set {to} = {}", node.show()),
        },
        _ => format!("set {to} = {}", node.show()),
    }
}

/// TRL's and Axolotl's batch size, multiplied out.
fn global_batch(document: &Document, key: &str) -> String {
    let find = |names: &[&str]| -> Option<i64> {
        let sections = document.root.iter().flat_map(|(name, node)| match &node.value {
            Value::Table(table) => table.iter().collect::<Vec<_>>(),
            Value::Integer(_) => {
                vec![document.root.iter().find(|(n, _)| n == name).expect("it is an entry of the root")]
            }
            _ => Vec::new(),
        });
        sections.into_iter().find(|(name, _)| names.contains(&name.as_str())).and_then(|(_, node)| match node.value {
            Value::Integer(n) if n > 0 => Some(n),
            _ => None,
        })
    };
    let gpus = find(&["num_processes", "nproc_per_node", "world_size"]).or_else(|| {
        let (_, node) = document.root.iter().find(|(name, _)| name == "cluster")?;
        let Value::Table(table) = &node.value else { return None };
        match table.iter().find(|(name, _)| name == "workers")?.1.value {
            Value::Integer(n) if n > 0 => Some(n),
            _ => None,
        }
    });
    let formula = "set train.global_batch_size = per device x accumulation x GPUs";
    let is_accumulation = ACCUMULATION.contains(&key);
    match (find(PER_DEVICE), find(ACCUMULATION).unwrap_or(1), gpus) {
        (Some(each), times, Some(gpus)) => match each.checked_mul(times).and_then(|n| n.checked_mul(gpus)) {
            Some(product) => format!("{formula} = {each} x {times} x {gpus} = {product}"),
            None => formula.to_owned(),
        },
        (Some(each), times, None) => match each.checked_mul(times) {
            Some(product) => format!("{formula} = {each} x {times} x GPUs = {product} x GPUs ({product} on one)"),
            None => formula.to_owned(),
        },
        (None, _, _) if is_accumulation => format!("remove it, and {formula}: accumulation follows from it"),
        _ => formula.to_owned(),
    }
}

/// The nearest known name, or the names there are.
fn near(section: Option<&str>, key: &str) -> String {
    let own = section.and_then(|section| KEYS.iter().find(|(name, _)| *name == section));
    if let Some((section, keys)) = own {
        if let Some(name) = nearest(key, keys.iter().copied()) {
            return format!("is unknown; did you mean {section}.{name}?");
        }
    }
    if section.is_none() {
        if let Some(name) = nearest(key, KEYS.iter().map(|(name, _)| *name)) {
            return format!("is an unknown section; did you mean [{name}]?");
        }
    }
    let all: Vec<String> = KEYS.iter().flat_map(|(s, keys)| keys.iter().map(move |k| format!("{s}.{k}"))).collect();
    if let Some(name) = all.iter().find(|full| nearest(key, full.split('.').skip(1)).is_some()) {
        return format!("is unknown; did you mean {name}?");
    }
    match own {
        Some((section, keys)) => format!("is unknown; [{section}] has {}", keys.join(", ")),
        None => {
            let names: Vec<&str> = KEYS.iter().map(|(name, _)| *name).collect();
            format!("is an unknown section; there are {}", names.join(", "))
        }
    }
}

/// The name most like `word`, if one is much like it.
pub(super) fn nearest<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let scored = names.map(|name| (strsim::jaro_winkler(word, name), name));
    scored.filter(|(score, _)| *score > 0.85).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name)
}
