//! Everything but the data: sizes, rates, schedules, intervals.

use super::source::{show, Given};
use super::{Draft, Error, Origin};
use unisono_configs::run::explanation;

/// Keys that are translated here or with the data.
const USED: &[&str] = &[
    "base_model",
    "model_name_or_path",
    "sequence_len",
    "max_length",
    "max_seq_length",
    "micro_batch_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_processes",
    "nproc_per_node",
    "num_epochs",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "seed",
    "bf16",
    "bfloat16",
    "dtype",
    "torch_dtype",
    "val_set_size",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "datasets",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
    "dataset_text_field",
    "test_datasets",
    "train_on_inputs",
    "completion_only_loss",
    "assistant_only_loss",
    "sample_packing",
    "packing",
    "base_model_config",
    "tokenizer_config",
    "test_split_size",
    "roles_to_train",
    "optimizer",
    "optim",
];

/// Which keys do something only where an adapter is trained.
const OF_ADAPTERS: &[&str] = &["lora_", "peft_", "load_in_", "use_rslora", "use_dora", "bnb_"];

/// Whether a key is translated.
#[cfg(test)]
pub fn is_used(key: &str) -> bool {
    USED.contains(&key)
}

pub fn translate(given: &Given, gpus: Option<u64>, draft: &mut Draft) -> Result<(), Error> {
    let axolotl = draft.origin == Origin::Axolotl;
    let first = |keys: &[&str]| keys.iter().find_map(|key| given.text(key).map(str::to_owned));
    match first(&["base_model", "model_name_or_path"]) {
        Some(path) => draft.set("model", "path", path),
        None => {
            draft.set("model", "path", "MODEL");
            draft.note("the file names no model; set model.path");
        }
    }
    precision(given, draft);
    lengths(given, draft)?;
    batch(given, gpus, draft)?;
    steps(given, draft)?;
    let number = |key: &str, default: f64| Ok::<f64, Error>(given.number(key)?.unwrap_or(default));
    let rate = match given.number("learning_rate")? {
        Some(rate) => rate,
        None => {
            draft.note("the file sets no learning_rate; this is the usual one");
            2e-5
        }
    };
    draft.set("train", "learning_rate", rate);
    schedule(given, draft)?;
    draft.set("train", "weight_decay", number("weight_decay", 0.0)?);
    let betas = [number("adam_beta1", 0.9)?, number("adam_beta2", 0.999)?];
    draft.set("train", "betas", betas.to_vec());
    draft.set("train", "eps", number("adam_epsilon", 1e-8)?);
    draft.set("train", "max_grad_norm", number("max_grad_norm", 1.0)?);
    draft.set("train", "seed", given.whole("seed")?.unwrap_or(42));
    let optimizer = first(&["optimizer", "optim"]).unwrap_or_default();
    if !optimizer.is_empty() && !optimizer.contains("adamw") {
        draft.leave(if axolotl { "optimizer" } else { "optim" }, &optimizer, "the optimizer is AdamW");
    } else if optimizer.contains("8bit") || optimizer.contains("4bit") {
        draft.note(format!("{optimizer} becomes AdamW with moments in fp32"));
    }
    intervals(given, draft)?;
    rest(given, draft);
    Ok(())
}

fn precision(given: &Given, draft: &mut Draft) {
    let dtype = given.text("dtype").or_else(|| given.text("torch_dtype")).unwrap_or_default();
    let named = given.text("bf16").or_else(|| given.text("bfloat16"));
    let compute = match (named.map(str::to_ascii_lowercase).as_deref(), dtype) {
        (Some("true" | "full"), _) | (None, "bfloat16") => "bf16",
        (Some("false"), dtype) if dtype != "bfloat16" && given.flag("fp16") != Some(true) => "fp32",
        (None, "float32") if draft.origin == Origin::Trl && given.node("fp16").is_none() => "auto",
        _ => "auto",
    };
    draft.set("model", "compute", compute);
}

fn lengths(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    let found = match given.whole("sequence_len")? {
        Some(n) => Some(n),
        None => given.whole("max_length")?.or(given.whole("max_seq_length")?),
    };
    let length = found.unwrap_or(if draft.origin == Origin::Axolotl { 512 } else { 1024 });
    draft.set("train", "max_length", length);
    if length > 4096 {
        draft.set("train", "max_tokens_per_micro_batch", length);
    }
    Ok(())
}

fn batch(given: &Given, gpus: Option<u64>, draft: &mut Draft) -> Result<(), Error> {
    let axolotl = draft.origin == Origin::Axolotl;
    let each = given.whole("micro_batch_size")?.or(given.whole("per_device_train_batch_size")?);
    let each = each.unwrap_or(if axolotl { 1 } else { 8 });
    let times = given.whole("gradient_accumulation_steps")?.unwrap_or(1);
    let named = given.whole("num_processes")?.or(given.whole("nproc_per_node")?);
    let devices = named.or(gpus.map(|n| n as i64)).unwrap_or(1);
    let size = each.checked_mul(times).and_then(|n| n.checked_mul(devices)).filter(|n| *n > 0);
    let Some(size) = size else {
        let problem = format!("{each} per device x {times} accumulated x {devices} GPUs is no batch size; correct it");
        return Err(Error::File { path: given.path.clone(), problem });
    };
    draft.set("train", "global_batch_size", size);
    let unknown = if named.is_none() && gpus.is_none() { " (give --gpus N if there were more)" } else { "" };
    draft.note(format!(
        "train.global_batch_size = {each} per device x {times} accumulated x {devices} GPU{}{unknown}",
        if devices == 1 { "" } else { "s" }
    ));
    // Fewer examples than micro-batches would leave some empty.
    if size < 8 {
        draft.set("train", "micro_batches", size);
    }
    if given.flag("sample_packing") == Some(true) || given.flag("packing") == Some(true) {
        draft.note(
            "with packing, that many packed rows made a batch, each of several examples; here it is examples: \
             multiply by the examples of a packed row to keep the batch",
        );
    }
    Ok(())
}

fn steps(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    if let Some(steps) = given.whole("max_steps")?.filter(|n| *n > 0) {
        draft.set("train", "steps", steps);
    }
    let default = if draft.origin == Origin::Axolotl { 1.0 } else { 3.0 };
    let epochs = given.number("num_epochs")?.or(given.number("num_train_epochs")?).unwrap_or(default);
    if epochs.fract() != 0.0 || epochs < 1.0 {
        draft
            .note(format!("{epochs} epochs become {}; set train.steps for a part of an epoch", epochs.ceil().max(1.0)));
    }
    draft.set("train", "epochs", epochs.ceil().max(1.0) as i64);
    Ok(())
}

fn schedule(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    let axolotl = draft.origin == Origin::Axolotl;
    let key = if given.node("lr_scheduler").is_some() { "lr_scheduler" } else { "lr_scheduler_type" };
    let name = given.text(key).unwrap_or(if axolotl { "cosine" } else { "linear" }).to_owned();
    let ours = match name.as_str() {
        "cosine" => "cosine",
        "linear" => "linear",
        "constant" | "constant_with_warmup" => "constant",
        "warmup_stable_decay" => "wsd",
        other => {
            draft.leave(key, other, "train.schedule is cosine, linear, constant or wsd; cosine stands for it");
            "cosine"
        }
    };
    draft.set("train", "schedule", ours);
    let ratio = given.number("warmup_ratio")?.filter(|x| *x > 0.0);
    let steps = given.number("warmup_steps")?.filter(|x| *x > 0.0);
    let warmup = match (steps, ratio) {
        (Some(steps), _) if steps < 1.0 => steps,
        (Some(steps), _) => steps.round(),
        (None, Some(ratio)) if ratio < 1.0 => ratio,
        (None, Some(_)) => 0.99,
        // Axolotl's own, but for its cap.
        (None, None) if axolotl && given.node("warmup_ratio").is_none() && given.node("warmup_steps").is_none() => {
            draft.note("Axolotl warms up over 3 % of the steps, at most 100");
            0.03
        }
        (None, None) => 0.0,
    };
    // A constant rate of transformers has no warmup at all.
    let warmup = if name == "constant" { 0.0 } else { warmup };
    match warmup >= 1.0 {
        true => draft.set("train", "warmup_steps", warmup as i64),
        false => draft.set("train", "warmup_steps", warmup),
    }
    Ok(())
}

fn intervals(given: &Given, draft: &mut Draft) -> Result<(), Error> {
    for (key, section) in [("eval_steps", "eval"), ("save_steps", "checkpoint")] {
        match given.number(key)? {
            Some(steps) if steps >= 1.0 => draft.set(section, "every", steps.round() as i64),
            Some(share) if share > 0.0 => {
                let reason = format!("{section}.every counts steps: set it to {share} x the steps of the run");
                draft.leave(key, &share.to_string(), reason);
            }
            _ => (),
        }
    }
    if let Some(keep) = given.whole("save_total_limit")?.filter(|n| *n > 0) {
        draft.set("checkpoint", "keep", keep);
    }
    Ok(())
}

/// Every other key, with the reason why it is left out.
fn rest(given: &Given, draft: &mut Draft) {
    let adapter = given.text("adapter").is_some_and(|kind| !kind.is_empty()) || given.flag("use_peft") == Some(true);
    for (key, node) in given.entries() {
        let of_adapters = OF_ADAPTERS.iter().any(|prefix| key.starts_with(prefix));
        // Switched off, it says what is so here anyway.
        let off = matches!(node.text().map(str::to_ascii_lowercase).as_deref(), Some("false" | "none" | "" | "[]"));
        if USED.contains(&key) || off || (of_adapters && !adapter) {
            continue;
        }
        let prefix = |names: &[&str]| names.iter().any(|name| key.starts_with(name));
        let reason = if let Some(text) = explanation(key) {
            text.strip_prefix("remove it: ").unwrap_or(text).to_owned()
        } else if of_adapters {
            "adapters are not supported yet: all weights are trained".into()
        } else if prefix(&[
            "wandb_",
            "mlflow_",
            "comet_",
            "trackio_",
            "use_wandb",
            "use_mlflow",
            "logging_",
            "log_",
            "swanlab_",
        ]) {
            "every step is logged; give --json for one event per line".into()
        } else if prefix(&["hub_", "push_to_hub", "push_dataset"]) {
            "nothing is uploaded; unisono export writes a directory that can be".into()
        } else if prefix(&["fsdp", "deepspeed", "ddp", "dp_", "tensor_parallel", "context_parallel", "accelerate"]) {
            "[cluster] decides how work and state are shared".into()
        } else if prefix(&["gradient_checkpointing", "activation_offloading"]) {
            "memory is planned before training".into()
        } else if prefix(&[
            "liger_",
            "flash_",
            "xformers",
            "sdp_",
            "attn_",
            "torch_compile",
            "use_kernels",
            "unsloth_",
            "cut_cross",
        ]) {
            "kernels are chosen by the device".into()
        } else if prefix(&["dataloader_", "dataset_", "pad_", "eval_sample_packing", "eval_packing", "packing_"]) {
            "rows are read, tokenized and packed by the coordinator".into()
        } else if matches!(key, "rl" | "trl" | "reward_model" | "process_reward_model") {
            "only supervised fine-tuning is done here".into()
        } else if key == "evals_per_epoch" || key == "saves_per_epoch" {
            let section = if key == "evals_per_epoch" { "eval" } else { "checkpoint" };
            format!("{section}.every counts steps: set it to the steps of an epoch / {}", show(node))
        } else if matches!(key, "eval_strategy" | "evaluation_strategy" | "save_strategy") {
            let section = if key == "save_strategy" { "checkpoint" } else { "eval" };
            format!("{section}.every decides, in steps")
        } else {
            "there is nothing like it here".into()
        };
        draft.leave(key, &show(node), reason);
    }
}
