//! Files of the forms that people have, and what becomes of each of their keys.

use super::*;

fn imported(name: &str, text: &str) -> Imported {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    import(&path, None).unwrap()
}

fn refusal(name: &str, text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    import(&path, None).unwrap_err().to_string().replace(&format!("{}/", dir.path().display()), "")
}

fn config(imported: &Imported) -> RunConfig {
    RunConfig::parse("test", &imported.toml, Path::new("/base")).unwrap()
}

fn reason<'i>(imported: &'i Imported, key: &str) -> &'i str {
    let left = imported.left.iter().find(|left| left.key == key);
    &left.unwrap_or_else(|| panic!("{key} is not listed: {:?}", imported.left)).reason
}

const AXOLOTL: &str = "\
base_model: models/tiny
datasets:
  - path: data/alpaca.jsonl
    type: alpaca
  - path: some/chat
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
    roles_to_train: [assistant, tool]
    split: train[:10%]
  - path: json
    data_files: [data/own.jsonl]
    type:
      field_instruction: question
      field_output: answer
      format: \"Q: {instruction}\\nA:\"
val_set_size: 0.1
output_dir: ./out
sequence_len: 8192
sample_packing: true
adapter: qlora
lora_r: 32
load_in_4bit: true
wandb_project:
wandb_name: run
gradient_accumulation_steps: 8
micro_batch_size: 2
num_epochs: 3
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-5
bf16: auto
tf32: false
gradient_checkpointing: true
warmup_ratio: 0.1
evals_per_epoch: 4
save_steps: 250
weight_decay: 0.01
adam_beta2: 0.95
special_tokens:
  pad_token: <|end_of_text|>
made_up_key: 3
";

#[test]
fn axolotls_yaml_becomes_a_configuration() {
    let imported = imported("lora.yml", AXOLOTL);
    assert_eq!(imported.origin, Origin::Axolotl);
    let config = config(&imported);
    let train = &config.train;
    assert_eq!((train.global_batch_size, train.epochs, train.max_length), (16, 3, 8192));
    assert_eq!((train.max_tokens_per_micro_batch, train.warmup_steps, train.learning_rate), (8192, 0.1, 2e-5));
    assert_eq!((train.betas, train.weight_decay, train.seed), ([0.9, 0.95], 0.01, 42));
    assert_eq!((config.split.validation, config.split.test, config.checkpoint.every), (0.1, 0.0, 250));
    let data: Vec<_> = config.data.iter().map(|d| (d.task(), serde_json::to_value(d.format).unwrap())).collect();
    assert_eq!(data[0], ("alpaca".into(), "alpaca".into()));
    assert_eq!(data[1], ("chat".into(), "sharegpt".into()));
    assert_eq!(config.data[1].roles_to_train, ["assistant", "tool"]);
    assert_eq!(config.data[2].path, Path::new("/base/data/own.jsonl"));
    assert_eq!(config.data[2].template.as_deref(), Some("Q: {{ question }}\nA:|||{{ answer }}"));
    assert!(reason(&imported, "adapter").contains("adapters are not supported"));
    assert!(reason(&imported, "load_in_4bit").contains("all weights are trained"));
    assert!(reason(&imported, "evals_per_epoch").contains("steps of an epoch / 4"));
    assert!(reason(&imported, "datasets.1.split").contains("all rows"));
    assert!(reason(&imported, "wandb_name").contains("--json"));
    assert!(reason(&imported, "made_up_key").contains("nothing like it"));
    assert!(imported.notes.iter().any(|n| n.contains("2 per device x 8 accumulated x 1 GPU")), "{:?}", imported.notes);
    assert!(imported.notes.iter().any(|n| n.contains("with packing")));
    // Every key of the file is translated or listed, but for those that are null or off.
    let silent = ["wandb_project", "tf32"];
    for line in AXOLOTL.lines().filter(|line| !line.starts_with([' ', '-'])) {
        let key = line.split(':').next().unwrap();
        let listed = imported.left.iter().any(|left| left.key == key);
        let used = super::settings::is_used(key);
        assert!(listed || used || silent.contains(&key), "{key} is lost");
    }
}

const COMMAND: &str = "\
# full training
accelerate launch --num_processes 4 \\
  trl/scripts/sft.py \\
    --model_name_or_path models/tiny \\
    --dataset_name data/rows.jsonl --learning-rate=2.0e-4 \\
    --num_train_epochs 1 --packing \\
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \\
    --eos_token '<|im_end|>' --eval_strategy steps --eval_steps 100 \\
    --lr_scheduler_type constant_with_warmup --warmup_steps 20 \\
    --bf16 --use_peft --lora_target_modules q_proj v_proj --no_push_to_hub --output_dir out
";

#[test]
fn trls_command_line_becomes_a_configuration() {
    let imported = imported("sft.sh", COMMAND);
    assert_eq!(imported.origin, Origin::Trl);
    let config = config(&imported);
    let train = &config.train;
    assert_eq!((train.global_batch_size, train.epochs, train.max_length), (64, 1, 1024));
    assert_eq!((train.learning_rate, train.warmup_steps), (2e-4, 20.0));
    assert_eq!(serde_json::to_value(train.schedule).unwrap(), "constant");
    assert_eq!(serde_json::to_value(config.model.compute).unwrap(), "bf16");
    assert_eq!((config.eval.every, config.split.validation), (100, 0.0));
    assert_eq!(config.data[0].path, Path::new("/base/data/rows.jsonl"));
    assert!(reason(&imported, "use_peft").contains("adapters"));
    assert_eq!(imported.left.iter().find(|l| l.key == "lora_target_modules").unwrap().value, "[q_proj, v_proj]");
    assert!(reason(&imported, "eos_token").len() > 5);
    assert!(!imported.left.iter().any(|left| left.key == "push_to_hub"), "switched off");
}

#[test]
fn trls_arguments_in_yaml_and_json_have_its_defaults() {
    let yaml = imported("a.yaml", "model_name_or_path: m\ndataset_name: d.jsonl\nwarmup_ratio: 0.05\n");
    let json = imported("a.json", r#"{"model_name_or_path": "m", "dataset_name": "d.jsonl", "warmup_ratio": 0.05}"#);
    assert_eq!(config(&yaml), config(&json));
    let train = config(&yaml).train;
    assert_eq!((train.epochs, train.global_batch_size, train.warmup_steps), (3, 8, 0.05));
    assert_eq!(serde_json::to_value(train.schedule).unwrap(), "linear");
    assert!(yaml.notes.iter().any(|note| note.contains("assistant_only_loss")));
}

#[test]
fn what_cannot_be_imported_is_one_sentence() {
    assert!(refusal("a.yml", "x: 1\n").starts_with("a.yml: is neither Axolotl's YAML (it has no base_model) nor TRL's"));
    assert!(refusal("a.yml", "x: [1\n").starts_with("a.yml: is not valid YAML"));
    assert_eq!(
        refusal("a.yml", "base_model: m\nlearning_rate: fast\n"),
        "a.yml:2: learning_rate: is fast and must be a number"
    );
    assert!(refusal("a.yml", "base_model: m\nmicro_batch_size: 0\n").contains("is no batch size"));
    let injected = imported("a.yml", "base_model: m\nlearning_rate: 1e-4\nmade_up: \"x\\n[train]\\nepochs = 9\"\n");
    assert_eq!(config(&injected).train.epochs, 1, "a value cannot become a line of the configuration");
}
