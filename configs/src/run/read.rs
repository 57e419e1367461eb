//! From a document to a `RunConfig`: every value checked for type and range, every key known.

use super::section::Section;
use super::tree::{Document, Node, Place, Value};
use super::{gate, names, rows, Error, OnBadNumbers, OnSpike};
use super::{
    Assignment, Checkpoint, Cluster, Compute, Count, Data, Device, Eval, Format, Held, Mixing, Model, Offload,
    OnBadRow, OptimizerState, Recompute, RunConfig, Schedule, Split, Train, Transport, Turns, ZeroStage,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Tokens and targets of a micro-batch travel in one message of at most 1 MiB.
const MOST_TOKENS: u64 = 130_000;

impl RunConfig {
    /// Reads a TOML file; `overrides` are `--set` options, `("train.epochs", "2")`.
    pub fn read(path: &Path, overrides: &[(String, String)]) -> Result<Self, Error> {
        let mut document = Document::read(path)?;
        overrides.iter().try_for_each(|(key, value)| document.set(key, value))?;
        config(&document, path.parent().unwrap_or(Path::new("")))
    }

    /// Reads TOML that is called `name` in errors; relative paths begin at `base`.
    pub fn parse(name: &str, toml: &str, base: &Path) -> Result<Self, Error> {
        config(&Document::parse(name.to_owned(), toml)?, base)
    }

    /// The configuration of `--model model --data files...`: everything else has its default.
    pub fn for_files(model: &Path, files: &[PathBuf], overrides: &[(String, String)]) -> Result<Self, Error> {
        let node = |option: &str, value| Node { value, place: Place::Option(option.into()) };
        let text = |option: &str, path: &Path| node(option, Value::Text(path.display().to_string()));
        let mut tables = Vec::new();
        for file in files {
            let table = vec![
                ("name".to_owned(), node("--data", Value::Text(task_name(file, files)))),
                ("path".to_owned(), text("--data", file)),
            ];
            tables.push(node("--data", Value::Table(table)));
        }
        let model = node("--model", Value::Table(vec![("path".into(), text("--model", model))]));
        let root = vec![("model".to_owned(), model), ("data".to_owned(), node("--data", Value::Array(tables)))];
        let mut document = Document { name: "command line".into(), root };
        overrides.iter().try_for_each(|(key, value)| document.set(key, value))?;
        config(&document, Path::new(""))
    }

    /// As TOML that [`RunConfig::read`] reads back.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("every value of a run configuration has a TOML form")
    }
}

/// Columns that the formats know, and the fields of a message.
const COLUMNS: &[&str] = &[
    "prompt",
    "completion",
    "messages",
    "conversations",
    "role",
    "content",
    "system",
    "tools",
    "chat_template_kwargs",
    "instruction",
    "input",
    "output",
    "text",
];

fn columns(s: &Section<'_>) -> Result<BTreeMap<String, String>, Error> {
    let Some(node) = s.node("columns") else { return Ok(BTreeMap::new()) };
    let Value::Table(table) = &node.value else {
        let problem = "must be a table; for example { prompt = \"question\", completion = \"answer\" }";
        return Err(s.fail("columns", format!("is {} and {problem}", node.show())));
    };
    let mut columns = BTreeMap::new();
    for (name, node) in table {
        let fail = |problem: String| Err(s.document.error(&node.place, &format!("data.columns.{name}"), problem));
        if !COLUMNS.contains(&name.as_str()) {
            let hint = names::nearest(name, COLUMNS.iter().copied());
            let hint =
                hint.map_or(format!("the formats have {}", COLUMNS.join(", ")), |n| format!("did you mean {n}?"));
            return fail(format!("is not a column of any format; {hint}"));
        }
        match &node.value {
            Value::Text(own) if columns.values().any(|known| known == own) => {
                return fail(format!("another column is \"{own}\", too; name each column of the rows once"));
            }
            Value::Text(own) if !own.is_empty() => columns.insert(name.clone(), own.clone()),
            _ => return fail(format!("is {} and must be the name of a column of the rows", node.show())),
        };
    }
    Ok(columns)
}

/// The file's stem, with its directory's name where two files share a stem.
fn task_name(file: &Path, files: &[PathBuf]) -> String {
    let own = super::stem(file);
    let parent = file.parent().and_then(Path::file_name);
    match (files.iter().filter(|other| super::stem(other) == own).count(), parent) {
        (0 | 1, _) | (_, None) => own,
        (_, Some(parent)) => format!("{}-{own}", parent.to_string_lossy()),
    }
}

fn config(document: &Document, base: &Path) -> Result<RunConfig, Error> {
    names::check(document)?;
    let section = |name| Section::new(document, name, base);
    let train = train(&section("train")?)?;
    let split_section = section("split")?;
    let split = Split {
        validation: share(&split_section, "validation", Split::default().validation)?,
        test: share(&split_section, "test", Split::default().test)?,
    };
    let data = Section::list(document, "data", base)?;
    if data.is_empty() {
        return Err(document.error(
            &Place::Line(1),
            "data",
            "is missing; write a [[data]] table with the path of a .jsonl file",
        ));
    }
    let mix = rows::mix(&section("mix")?)?;
    let weighed = |s: &&Section<'_>| s.node("weight").is_some_and(|node| node.number() != Some(1.0));
    if let (false, Some(s)) = (mix.by == Mixing::Weights, data.iter().find(weighed)) {
        return Err(s.fail("weight", "has no effect; set mix.by = \"weights\", or remove it"));
    }
    Ok(RunConfig {
        mix,
        tokens: rows::tokens(&section("tokens")?)?,
        model: model(&section("model")?)?,
        data: data.iter().map(|s| table(s, &split)).collect::<Result<_, _>>()?,
        gate: gate::read(&section("gate")?)?,
        split,
        train,
        cluster: cluster(&section("cluster")?)?,
        eval: Eval { every: section("eval")?.whole("every", Eval::default().every, 0)? },
        checkpoint: checkpoint(&section("checkpoint")?)?,
    })
}

fn model(s: &Section<'_>) -> Result<Model, Error> {
    let path = s.source("path")?;
    Ok(Model {
        path: path.ok_or_else(|| s.fail("path", "is missing; set it to a Hugging Face model directory"))?,
        revision: s.text("revision")?.map(str::to_owned),
        compute: s.choice(
            "compute",
            Compute::Auto,
            &[("auto", Compute::Auto), ("bf16", Compute::Bf16), ("fp32", Compute::Fp32)],
        )?,
    })
}

fn table(s: &Section<'_>, split: &Split) -> Result<Data, Error> {
    let format = s.choice(
        "format",
        Format::Auto,
        &[
            ("auto", Format::Auto),
            ("prompt-completion", Format::PromptCompletion),
            ("messages", Format::Messages),
            ("alpaca", Format::Alpaca),
            ("sharegpt", Format::Sharegpt),
            ("text", Format::Text),
        ],
    )?;
    let template = s.text("template")?;
    let (template_file, template_name) = (s.path("template_file")?, s.text("template_name")?);
    if let (Some(_), Some(_)) = (template, &template_file) {
        return Err(s.fail("template_file", "cannot stand beside data.template; remove one of them"));
    }
    let few_shot = s.whole("few_shot", 0, 0)?;
    if few_shot > 1000 {
        return Err(s.fail("few_shot", format!("is {few_shot} and must be at most 1000")));
    }
    if (template.is_some() || template_file.is_some()) && !matches!(format, Format::Auto | Format::PromptCompletion) {
        let problem = "this format reads its own columns and takes no template; remove data.format or the template";
        return Err(s.fail("format", problem));
    }
    let (validation, test) = (held(s, "validation")?, held(s, "test")?);
    let of = |held: &Option<Held>, default: f64| match held {
        None => default,
        Some(Held::Share(share)) => *share,
        Some(Held::File(_)) => 0.0,
    };
    let sum = of(&validation, split.validation) + of(&test, split.test);
    if sum >= 1.0 {
        let problem =
            format!("the shares of validation and test add up to {sum} and leave nothing to train on; lower one");
        return Err(s.fail("validation", problem));
    }
    let path = s.source("path")?;
    let columns = columns(s)?;
    if template.is_some() && !columns.is_empty() {
        return Err(s.fail("columns", "a template names the rows' own columns; remove data.columns or data.template"));
    }
    Ok(Data {
        name: s.text("name")?.map(str::to_owned),
        path: path.ok_or_else(|| s.fail("path", "is missing; set it to a .jsonl file"))?,
        revision: s.text("revision")?.map(str::to_owned),
        format,
        columns,
        template: template.map(str::to_owned),
        template_file,
        template_name: template_name.map(str::to_owned),
        delimiter: s.any_text("delimiter", " ")?,
        few_shot: few_shot as usize,
        few_shot_delimiter: s.any_text("few_shot_delimiter", "\n\n")?,
        group_by: s.text("group_by")?.map(str::to_owned),
        roles_to_train: roles(s)?,
        turns: s.choice("turns", Turns::All, &[("all", Turns::All), ("last", Turns::Last)])?,
        validation,
        test,
        on_bad_row: s.choice(
            "on_bad_row",
            OnBadRow::Refuse,
            &[("refuse", OnBadRow::Refuse), ("drop", OnBadRow::Drop)],
        )?,
        max_dropped: s.real("max_dropped", 0.01, |x| (0.0..=1.0).contains(&x), "a share between 0 and 1")?,
        weight: s.real("weight", 1.0, |x| x >= 0.0, "a number of at least 0")?,
    })
}

fn roles(s: &Section<'_>) -> Result<Vec<String>, Error> {
    let Some(node) = s.node("roles_to_train") else { return Ok(vec!["assistant".into()]) };
    let names: Option<Vec<String>> = match &node.value {
        Value::Array(list) => (list.iter())
            .map(|role| match &role.value {
                Value::Text(role) if !role.is_empty() => Some(role.clone()),
                _ => None,
            })
            .collect(),
        _ => None,
    };
    match names {
        Some(names) if !names.is_empty() => Ok(names),
        _ => Err(s.fail("roles_to_train", "must be a list of roles; for example [\"assistant\"]")),
    }
}

fn share(s: &Section<'_>, key: &str, default: f64) -> Result<f64, Error> {
    s.real(key, default, |x| (0.0..1.0).contains(&x), "a share of the rows from 0 to below 1")
}

fn held(s: &Section<'_>, key: &str) -> Result<Option<Held>, Error> {
    Ok(match s.node(key) {
        None => None,
        Some(Node { value: Value::Text(_), .. }) => s.source(key)?.map(Held::File),
        Some(_) => Some(Held::Share(s.real(
            key,
            0.0,
            |x| (0.0..1.0).contains(&x),
            "a share from 0 to below 1, or a .jsonl file",
        )?)),
    })
}

fn train(s: &Section<'_>) -> Result<Train, Error> {
    let d = Train::default();
    let schedules = [
        ("cosine", Schedule::Cosine),
        ("linear", Schedule::Linear),
        ("constant", Schedule::Constant),
        ("wsd", Schedule::Wsd),
    ];
    let train = Train {
        epochs: s.whole("epochs", d.epochs, 1)?,
        steps: s.node("steps").map(|_| s.whole("steps", 1, 1)).transpose()?,
        global_batch_size: s.whole("global_batch_size", d.global_batch_size as u64, 1)? as usize,
        micro_batches: s.whole("micro_batches", d.micro_batches as u64, 1)? as usize,
        max_length: s.whole("max_length", d.max_length as u64, 2)? as usize,
        max_tokens_per_micro_batch: s.whole("max_tokens_per_micro_batch", d.max_tokens_per_micro_batch as u64, 1)?
            as usize,
        learning_rate: s.real("learning_rate", d.learning_rate, |x| x >= 0.0, "a number of at least 0")?,
        schedule: s.choice("schedule", d.schedule, &schedules)?,
        warmup_steps: s.real(
            "warmup_steps",
            d.warmup_steps,
            |x| (0.0..1.0).contains(&x) || x >= 1.0 && x.fract() == 0.0,
            "a share of the steps below 1, or a whole number of steps",
        )?,
        weight_decay: s.real("weight_decay", d.weight_decay, |x| x >= 0.0, "a number of at least 0")?,
        betas: betas(s, d.betas)?,
        eps: s.real("eps", d.eps, |x| x > 0.0, "a number above 0")?,
        max_grad_norm: s.real(
            "max_grad_norm",
            d.max_grad_norm,
            |x| x >= 0.0,
            "a number of at least 0 (0: no clipping)",
        )?,
        optimizer_state: s.choice(
            "optimizer_state",
            d.optimizer_state,
            &[("fp32", OptimizerState::Fp32), ("bf16", OptimizerState::Bf16)],
        )?,
        shuffle: s.flag("shuffle", d.shuffle)?,
        seed: s.whole("seed", d.seed, 0)?,
        on_spike: s.choice(
            "on_spike",
            d.on_spike,
            &[("warn", OnSpike::Warn), ("stop", OnSpike::Stop), ("quarantine", OnSpike::Quarantine)],
        )?,
        on_bad_numbers: s.choice(
            "on_bad_numbers",
            d.on_bad_numbers,
            &[("stop", OnBadNumbers::Stop), ("quarantine", OnBadNumbers::Quarantine)],
        )?,
        spike_mads: s.real("spike_mads", d.spike_mads, |x| x >= 0.0, "a number of at least 0 (0: never)")?,
        spike_window: s.whole("spike_window", d.spike_window as u64, 1)? as usize,
    };
    let (length, tokens) = (train.max_length, train.max_tokens_per_micro_batch);
    if tokens as u64 > MOST_TOKENS {
        return Err(s.fail("max_tokens_per_micro_batch", format!("is {tokens} and must be at most {MOST_TOKENS}")));
    }
    if length > tokens {
        let key =
            if s.node("max_tokens_per_micro_batch").is_some() { "max_tokens_per_micro_batch" } else { "max_length" };
        return Err(s.fail(
            key,
            format!("a row of train.max_length = {length} does not fit into train.max_tokens_per_micro_batch = {tokens}; set train.max_tokens_per_micro_batch = {length}"),
        ));
    }
    if train.micro_batches > 4096 {
        return Err(s.fail("micro_batches", format!("is {} and must be at most 4096", train.micro_batches)));
    }
    Ok(train)
}

fn betas(s: &Section<'_>, default: [f64; 2]) -> Result<[f64; 2], Error> {
    let Some(node) = s.node("betas") else { return Ok(default) };
    let numbers: Vec<f64> = match &node.value {
        Value::Array(list) => list.iter().filter_map(Node::number).filter(|b| (0.0..1.0).contains(b)).collect(),
        _ => Vec::new(),
    };
    match numbers.as_slice() {
        [first, second] => Ok([*first, *second]),
        _ => Err(s.fail("betas", "must be two numbers from 0 to below 1; for example [0.9, 0.999]")),
    }
}

fn cluster(s: &Section<'_>) -> Result<Cluster, Error> {
    let d = Cluster::default();
    let auto = |key: &str| matches!(s.node(key), None | Some(Node { value: Value::Text(_), .. }));
    let workers = match auto("workers") {
        true => s.choice("workers", d.workers, &[("auto", Count::Auto)])?,
        false => Count::Exactly(s.whole("workers", 1, 1)? as usize),
    };
    let zero_stage = match auto("zero_stage") {
        true => s.choice("zero_stage", d.zero_stage, &[("auto", ZeroStage::Auto)])?,
        false => match s.whole("zero_stage", 1, 1)? {
            stage @ 1..=3 => ZeroStage::Stage(stage as u32),
            n => return Err(s.fail("zero_stage", format!("is {n} and must be \"auto\", 1, 2 or 3"))),
        },
    };
    let seconds = "a number of seconds above 0";
    let heartbeat = s.real("heartbeat", d.heartbeat, |x| x > 0.0, seconds)?;
    let lease = s.real("lease", d.lease, |x| x > 0.0, seconds)?;
    if lease < 2.0 * heartbeat {
        let least = 2.0 * heartbeat;
        return Err(s.fail("lease", format!("is {lease} and must be at least {least}, twice cluster.heartbeat")));
    }
    let device =
        s.choice("device", d.device, &[("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda)])?;
    let transports = [("auto", Transport::Auto), ("tcp", Transport::Tcp), ("nccl", Transport::Nccl)];
    let transport = s.choice("transport", d.transport, &transports)?;
    Ok(Cluster {
        workers,
        threads_per_worker: s.whole("threads_per_worker", d.threads_per_worker as u64, 1)? as usize,
        device,
        zero_stage,
        recompute: s.choice(
            "recompute",
            d.recompute,
            &[
                ("auto", Recompute::Auto),
                ("nothing", Recompute::Nothing),
                ("norms", Recompute::Norms),
                ("up-projection", Recompute::UpProjection),
                ("block", Recompute::Block),
            ],
        )?,
        offload: s.choice(
            "offload",
            d.offload,
            &[
                ("auto", Offload::Auto),
                ("nothing", Offload::Nothing),
                ("masters", Offload::Masters),
                ("moments", Offload::Moments),
                ("state", Offload::State),
                ("all", Offload::All),
            ],
        )?,
        assignment: s.choice(
            "assignment",
            d.assignment,
            &[("balanced", Assignment::Balanced), ("shuffled", Assignment::Shuffled)],
        )?,
        transport,
        peer_timeout: s.real(
            "peer_timeout",
            d.peer_timeout,
            |x| (0.001..1e6).contains(&x),
            "a number of seconds from 0.001",
        )?,
        heartbeat,
        lease,
        hang_after: s.real("hang_after", d.hang_after, |x| x > 0.0, seconds)?,
        rejoin_timeout: s.real(
            "rejoin_timeout",
            d.rejoin_timeout,
            |x| (0.0..1e6).contains(&x),
            "a number of seconds from 0",
        )?,
        restarts: s.whole("restarts", u64::from(d.restarts), 0)? as u32,
        token_hours: s.real(
            "token_hours",
            d.token_hours,
            |x| x > 0.0 && x <= 87_600.0,
            "a number of hours above 0, and at most 87600",
        )?,
        token_uses: match auto("token_uses") {
            true => s.choice("token_uses", d.token_uses, &[("auto", Count::Auto)])?,
            false => Count::Exactly(s.whole("token_uses", 1, 1)? as usize),
        },
    })
}

fn checkpoint(s: &Section<'_>) -> Result<Checkpoint, Error> {
    let d = Checkpoint::default();
    if let Some(node @ Node { value: Value::Text(_), .. }) = s.node("every") {
        let problem = format!("is {}, but only a number of steps is supported yet; for example 500", node.show());
        return Err(s.fail("every", problem));
    }
    let copy_to = match s.text("copy_to")? {
        Some(url) if url.contains("://") => Some(url.to_owned()),
        _ => s.path("copy_to")?.map(|path| path.display().to_string()),
    };
    Ok(Checkpoint {
        copy_to,
        every: s.whole("every", d.every, 0)?,
        snapshot_every: s.whole("snapshot_every", d.snapshot_every, 0)?,
        keep: s.whole("keep", d.keep as u64, 1)? as usize,
        grace: s.real("grace", d.grace, |x| x > 0.0 && x < 1e6, "a number of seconds above 0")?,
    })
}
