//! The sentence of each refusal, and what "auto" becomes.

use super::*;
use std::path::Path;

fn read(text: &str, overrides: &[(&str, &str)]) -> Result<RunConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.toml");
    std::fs::write(&path, text).unwrap();
    let overrides: Vec<(String, String)> = overrides.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
    RunConfig::read(&path, &overrides).map_err(|e| e.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

const HEAD: &str = "[model]\npath = \"m\"\n[[data]]\npath = \"d/rows.jsonl\"\n";

fn refused(tail: &str) -> String {
    read(&format!("{HEAD}{tail}"), &[]).unwrap_err()
}

#[test]
fn defaults_are_those_of_the_types() {
    let config = read(HEAD, &[]).unwrap();
    assert_eq!((config.train, config.split), (Train::default(), Split::default()));
    assert_eq!(
        (config.cluster, config.eval, config.checkpoint),
        (Cluster::default(), Eval::default(), Checkpoint::default())
    );
    assert!(config.model.path.is_absolute() && config.model.path.ends_with("m"));
    assert_eq!(config.data[0].task(), "rows");
}

#[test]
fn unknown_keys_are_refused_with_the_nearest() {
    for (tail, expected) in [
        ("[train]\nlerning_rate = 1", "run.toml:6: train.lerning_rate: is unknown; did you mean train.learning_rate?"),
        ("[trian]\nepochs = 1", "run.toml:5: trian: is an unknown section; did you mean [train]?"),
        ("[eval]\nevery = 5\nzzz = 1", "run.toml:7: eval.zzz: is unknown; [eval] has every"),
        ("[model.adapter]\nrank = 8", "run.toml:5: model.adapter: is not supported yet; remove it"),
        ("[lora]\nr = 8", "run.toml:5: lora: remove it: adapters are not supported yet, all weights are trained"),
        ("weight = 2.0", "run.toml:5: data.weight: has no effect; set mix.by = \"weights\", or remove it"),
        ("seed = 1", "run.toml:5: data.seed: belongs to another section; set train.seed = 1"),
    ] {
        assert_eq!(refused(tail), expected);
    }
    let top = read("learning_rate = 2e-5\n", &[]).unwrap_err();
    assert_eq!(top, "run.toml:1: learning_rate: belongs to another section; set train.learning_rate = 2e-5");
}

#[test]
fn other_trainers_names_are_translated() {
    let batch = "[train]\nper_device_train_batch_size = 8\ngradient_accumulation_steps = 4\n";
    assert_eq!(
        refused(&format!("{batch}[cluster]\nworkers = 4")),
        "run.toml:6: train.per_device_train_batch_size: set train.global_batch_size = per device x accumulation x GPUs = 8 x 4 x 4 = 128"
    );
    assert_eq!(
        refused(batch),
        "run.toml:6: train.per_device_train_batch_size: set train.global_batch_size = per device x accumulation x GPUs = 8 x 4 x GPUs = 32 x GPUs (32 on one)"
    );
    assert_eq!(
        read("base_model: x", &[]).unwrap_err().split(": ").take(2).collect::<Vec<_>>(),
        ["run.toml:1", "not valid TOML"]
    );
    for (key, expected) in [
        (
            "micro_batch_size = 2",
            "set train.global_batch_size = per device x accumulation x GPUs = 2 x 1 x GPUs = 2 x GPUs (2 on one)",
        ),
        ("num_train_epochs = 3", "set train.epochs = 3"),
        ("lr = 1e-4", "set train.learning_rate = 1e-4"),
        ("max_seq_length = 512", "set train.max_length = 512"),
        ("sequence_len = 512", "set train.max_length = 512"),
        ("warmup_ratio = 0.1", "set train.warmup_steps = 0.1 (below 1: a share of the steps)"),
        ("lr_scheduler_type = \"linear\"", "set train.schedule = \"linear\""),
        (
            "lr_scheduler = \"polynomial\"",
            "set train.schedule = \"cosine\", \"linear\", \"constant\" or \"wsd\"; \"polynomial\" is not supported",
        ),
        ("bf16 = true", "set model.compute = \"bf16\""),
        ("bf16 = false", "set model.compute = \"fp32\""),
        ("base_model = \"x/y\"", "set model.path = \"x/y\""),
        ("datasets = []", "write one [[data]] table with a path per task"),
        ("val_set_size = 0.1", "set split.validation = 0.1"),
        ("output_dir = \"o\"", "give --run-dir DIR on the command line"),
        ("sample_packing = true", "remove it: rows are always packed, without padding and without seeing each other"),
        ("max_steps = -1", "remove it: without train.steps, train.epochs decides"),
    ] {
        let name = key.split(' ').next().unwrap();
        assert_eq!(read(&format!("{key}\n{HEAD}"), &[]).unwrap_err(), format!("run.toml:1: {name}: {expected}"));
        assert_eq!(refused(&format!("[train]\n{key}")), format!("run.toml:6: train.{name}: {expected}"));
    }
}

#[test]
fn values_out_of_range_are_refused() {
    for (tail, expected) in [
        ("[train]\nepochs = 0", "run.toml:6: train.epochs: is 0 and must be a whole number of at least 1"),
        ("[train]\nepochs = \"3\"", "run.toml:6: train.epochs: is \"3\" and must be a whole number of at least 1"),
        ("[train]\nlearning_rate = nan", "run.toml:6: train.learning_rate: is NaN and must be a number of at least 0"),
        ("[train]\nschedule = \"cosin\"", "run.toml:6: train.schedule: is \"cosin\" and must be \"cosine\" or \"linear\" or \"constant\" or \"wsd\"; did you mean \"cosine\"?"),
        ("[train]\nwarmup_steps = 1.5", "run.toml:6: train.warmup_steps: is 1.5 and must be a share of the steps below 1, or a whole number of steps"),
        ("[train]\nbetas = [0.9]", "run.toml:6: train.betas: must be two numbers from 0 to below 1; for example [0.9, 0.999]"),
        ("[train]\nshuffle = 1", "run.toml:6: train.shuffle: is 1 and must be true or false"),
        ("[train]\nmax_length = 8192", "run.toml:6: train.max_length: a row of train.max_length = 8192 does not fit into train.max_tokens_per_micro_batch = 4096; set train.max_tokens_per_micro_batch = 8192"),
        ("[split]\ntest = 1.0", "run.toml:6: split.test: is 1 and must be a share of the rows from 0 to below 1"),
        ("validation = 0.6\ntest = 0.5", "run.toml:5: data.validation: the shares of validation and test add up to 1.1 and leave nothing to train on; lower one"),
        ("roles_to_train = \"user\"", "run.toml:5: data.roles_to_train: must be a list of roles; for example [\"assistant\"]"),
        ("on_bad_row = \"skip\"", "run.toml:5: data.on_bad_row: is \"skip\" and must be \"refuse\" or \"drop\""),
        ("[cluster]\nworkers = 0", "run.toml:6: cluster.workers: is 0 and must be a whole number of at least 1"),
        ("[cluster]\nzero_stage = 4", "run.toml:6: cluster.zero_stage: is 4 and must be \"auto\", 1, 2 or 3"),
        ("[checkpoint]\nevery = \"30m\"", "run.toml:6: checkpoint.every: is \"30m\", but only a number of steps is supported yet; for example 500"),
        ("[[train]]\nepochs = 1", "run.toml:5: train: is a list and must be a section; write [train]"),
    ] {
        assert_eq!(refused(tail), expected);
    }
    assert_eq!(
        read("[[data]]\npath = \"d\"\n", &[]).unwrap_err(),
        "run.toml:1: model.path: is missing; set it to a Hugging Face model directory"
    );
    assert_eq!(
        read("[model]\npath = \"d\"\n", &[]).unwrap_err(),
        "run.toml:1: data: is missing; write a [[data]] table with the path of a .jsonl file"
    );
    let missing = RunConfig::read(Path::new("absent.toml"), &[]).unwrap_err().to_string();
    assert_eq!(missing, "absent.toml: cannot be read (No such file or directory (os error 2)); give the path of a run configuration, or --model DIR --data FILE");
}

#[test]
fn options_override_the_file() {
    let config = read(
        HEAD,
        &[
            ("train.learning_rate", "1e-4"),
            ("train.schedule", "wsd"),
            ("data.on_bad_row", "drop"),
            ("data.path", "/x/y.jsonl"),
        ],
    )
    .unwrap();
    assert_eq!((config.train.learning_rate, config.train.schedule), (1e-4, Schedule::Wsd));
    assert_eq!((config.data[0].on_bad_row, config.data[0].path.as_path()), (OnBadRow::Drop, Path::new("/x/y.jsonl")));
    assert_eq!(
        read(HEAD, &[("train.epochs", "x")]).unwrap_err(),
        "--set train.epochs=x: train.epochs: is \"x\" and must be a whole number of at least 1"
    );
    let example = "names no section; write --set section.key=value, for example --set train.epochs=2";
    for (key, value, problem) in [
        ("epochs", "1", "belongs to another section; set train.epochs = 1"),
        ("lr", "1", "set train.learning_rate = 1"),
        ("lr_scheduler_type", "constant_with_warmup", "set train.schedule = \"constant\""),
        // Of evaluation or of checkpoints?
        ("every", "1", example),
        ("nonsense", "1", example),
    ] {
        assert_eq!(read(HEAD, &[(key, value)]).unwrap_err(), format!("--set {key}={value}: {key}: {problem}"));
    }
    assert_eq!(
        read(HEAD, &[("train.epoch", "1")]).unwrap_err(),
        "--set train.epoch=1: train.epoch: is unknown; did you mean train.epochs?"
    );
}

#[test]
fn files_on_the_command_line_make_a_configuration() {
    let files = [PathBuf::from("/a/train.jsonl"), PathBuf::from("/b/train.jsonl"), PathBuf::from("/b/other.jsonl")];
    let config = RunConfig::for_files(Path::new("/m"), &files, &[("train.seed".into(), "7".into())]).unwrap();
    let names: Vec<String> = config.data.iter().map(Data::task).collect();
    assert_eq!(names, ["a-train", "b-train", "other"]);
    assert_eq!((config.train.seed, config.model.path.as_path()), (7, Path::new("/m")));
}

#[test]
fn a_resolved_configuration_reads_back_as_itself() {
    let tail = "template = \"\"\"{{ a }}\n||| \\\"{{ b }}\\\"\"\"\"\nvalidation = 0.1\ntest = \"t.jsonl\"\n[train]\nsteps = 7\n";
    let mut config = read(&format!("{HEAD}{tail}"), &[]).unwrap();
    config.resolve(2, 0, true).unwrap();
    assert_eq!(read(&config.to_toml(), &[]).unwrap(), config);
}

#[test]
fn auto_becomes_what_the_machine_has() {
    let resolved = |tail: &str, cores, gpus, bf16| {
        let mut config = read(&format!("{HEAD}{tail}"), &[]).unwrap();
        config.resolve(cores, gpus, bf16).map(|()| config).map_err(|e| e.to_string())
    };
    let plain = resolved("", 2, 0, true).unwrap();
    assert_eq!((plain.cluster.workers, plain.cluster.device), (Count::Exactly(2), Device::Cpu));
    assert_eq!((plain.cluster.zero_stage, plain.model.compute), (ZeroStage::Auto, Compute::Bf16));
    assert_eq!(resolved("", 64, 0, false).unwrap().cluster.workers, Count::Exactly(8));
    assert_eq!(resolved("", 64, 0, false).unwrap().model.compute, Compute::Fp32);
    assert_eq!(resolved("", 64, 4, false).unwrap().model.compute, Compute::Bf16);
    assert_eq!(resolved("", 64, 4, false).unwrap().cluster.workers, Count::Exactly(4));
    assert_eq!(resolved("[cluster]\nthreads_per_worker = 4", 2, 0, false).unwrap().cluster.workers, Count::Exactly(1));
    let many = resolved("[cluster]\nworkers = 9", 2, 0, true).unwrap_err();
    assert!(many.starts_with("configuration: cluster.workers: is 9, but train.micro_batches = 8 gives work to at most 8; set train.micro_batches = 9"), "{many}");
    assert!(resolved("[cluster]\ndevice = \"cuda\"", 2, 0, true).unwrap_err().contains("no GPU"));
    let nccl = |gpus| resolved("[cluster]\ntransport = \"nccl\"", 2, gpus, true);
    assert!(nccl(0).unwrap_err().contains("cluster.transport: is \"nccl\", which needs cluster.device"));
    assert_eq!(nccl(2).unwrap().cluster.transport, Transport::Nccl);
}

#[test]
fn options_reach_one_table_or_all() {
    let overrides = [("data.1.name", "second"), ("data.max_dropped", "0.5")];
    let config = read(&format!("{HEAD}[[data]]\npath = \"b\""), &overrides).unwrap();
    assert_eq!((config.data[0].task().as_str(), config.data[1].task().as_str()), ("rows", "second"));
    assert!(config.data.iter().all(|d| d.max_dropped == 0.5));
    assert!(read(HEAD, &[("data.1.name", "second")]).unwrap_err().contains("data.1.name: is unknown"));
}

proptest::proptest! {
    #[test]
    fn no_document_panics(text in "(\\[{0,2}(model|data|train|x)\\]{0,2}|[a-z_]{1,12} ?= ?([0-9.eE+-]{1,6}|\"[a-z./]{0,5}\"|\\[[0-9,]{0,5}\\]|\\{\\}|true)|.{0,8})(\n(\\[train\\]|(epochs|betas|path|micro_batch_size) = .{0,5})){0,4}") {
        let _ = read(&text, &[]);
        let _ = read(HEAD, &[(text.as_str(), "1"), ("train.seed", text.as_str())]);
    }
}
