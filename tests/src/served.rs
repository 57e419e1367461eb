//! A coordinator inside the test: a small data set, a model description without weights, and a run of `serve`.

use crate::scale;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::oneshot;
use unisono::data::{Dataset, Example};
use unisono::run::event::Outcome;
use unisono::serve::control::Control;
use unisono::serve::setup::VIEWER_PATIENCE;
use unisono::serve::{serve, Error, Observer, Setup, Work};
use unisono_configs::model::{Layout, ModelSpec};
use unisono_configs::run::{Compute, Count, Device, RunConfig, ZeroStage};
use unisono_proto::v1::{Event, Suite};

/// A run to be served.
pub struct Served {
    pub config: RunConfig,
    pub spec: ModelSpec,
    pub dataset: Arc<Dataset>,
    pub viewer_patience: Duration,
    home: tempfile::TempDir,
}

/// A run that is being served.
pub struct Serving {
    pub control: Control,
    pub run_dir: PathBuf,
    /// Ends the run early, with this sentence.
    pub stop: oneshot::Sender<String>,
    pub events: Arc<Mutex<Vec<Event>>>,
    task: tokio::task::JoinHandle<Result<Outcome, Error>>,
}

struct Notes {
    control: Mutex<Option<oneshot::Sender<Control>>>,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Observer for Notes {
    fn listening(&self, control: &Control) {
        if let Some(told) = self.control.lock().expect("not poisoned").take() {
            told.send(control.clone()).ok();
        }
    }

    fn event(&self, event: &Event) {
        self.events.lock().expect("not poisoned").push(event.clone());
    }
}

impl Served {
    /// `rows` training rows of two tasks, for `workers` workers.
    pub fn new(rows: usize, workers: usize) -> Self {
        let home = tempfile::tempdir().expect("a temporary directory can be made");
        let json = serde_json::json!({
            "model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 512,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": true,
        });
        let spec = ModelSpec::from_json(&json, Path::new("config.json")).expect("a Llama");
        let toml = format!("[model]\npath = {:?}\n[[data]]\npath = \"none.jsonl\"\n", home.path());
        let path = home.path().join("run.toml");
        std::fs::write(&path, toml).expect("the temporary directory can be written");
        let mut config = RunConfig::read(&path, &[]).expect("a configuration");
        config.model.compute = Compute::Fp32;
        config.cluster.device = Device::Cpu;
        config.cluster.workers = Count::Exactly(workers);
        config.cluster.zero_stage = ZeroStage::Stage(1);
        // Fake workers compute on the thread that beats.
        config.cluster.lease = 30.0;
        config.train.global_batch_size = 16;
        config.train.max_tokens_per_micro_batch = 256;
        config.eval.every = 2;
        config.checkpoint.every = 3;
        let example = |i: usize| Example {
            task: (i % 2) as u32,
            row: i as u64,
            tokens: (0..8 + i * 7 % 20).map(|t| ((i * 31 + t * 13) % 96) as u32).collect(),
            prompt: (2 + i % 4) as u32,
            gaps: Box::default(),
        };
        let examples = |rows: std::ops::Range<usize>| rows.map(example).collect();
        let tasks = vec!["copy".into(), "count".into()];
        let dataset =
            Dataset::given(tasks, examples(0..rows), examples(rows..rows + 9), examples(rows + 9..rows + 14), 0);
        Served { config, spec, dataset: Arc::new(dataset), viewer_patience: VIEWER_PATIENCE, home }
    }

    /// As many steps of about 1,000 tokens for each of `workers` workers, over rows of [`scale::row`], each once.
    pub fn wide(workers: usize, steps: usize) -> Self {
        const ROWS_EACH: usize = 10;
        let mut served = Served::new(0, workers);
        let train = &mut served.config.train;
        (train.micro_batches, train.global_batch_size) = (workers, workers * ROWS_EACH);
        train.max_tokens_per_micro_batch = 2048;
        (served.config.eval.every, served.config.checkpoint.every) = (0, 0);
        let rows = |rows: std::ops::Range<usize>| rows.map(|row| scale::row(row as u64)).collect();
        let count = workers * ROWS_EACH * steps;
        let dataset = Dataset::given(vec!["wide".into()], rows(0..count), Vec::new(), Vec::new(), 0);
        served.dataset = Arc::new(dataset);
        served
    }

    pub fn layout(&self) -> Layout {
        Layout::new(&self.spec)
    }

    pub fn training(&self) -> Work {
        Work::train(self.dataset.clone(), &self.config, &self.spec).expect("a plan")
    }

    pub fn evaluating(&self) -> Work {
        let suites = [Suite::Validation, Suite::Test];
        Work::evaluate(self.dataset.clone(), &suites, &self.config, &self.spec).expect("units")
    }

    /// Starts to serve `work` in a run directory `name`.
    pub async fn start(&self, name: &str, work: Work) -> Serving {
        let run_dir = self.home.path().join(name);
        std::fs::create_dir_all(&run_dir).expect("the temporary directory can be written");
        let (told, control) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let events = Arc::new(Mutex::new(Vec::new()));
        let setup = Setup {
            listener: TcpListener::bind("127.0.0.1:0").expect("a free port"),
            advertise: None,
            run_dir: run_dir.clone(),
            config: self.config.clone(),
            spec: self.spec.clone(),
            work,
            viewer_patience: self.viewer_patience,
            observer: Arc::new(Notes { control: Mutex::new(Some(told)), events: events.clone() }),
            resume: None,
            conclude: None,
        };
        let shutdown = async move {
            match stopped.await {
                Ok(reason) => reason,
                Err(_) => std::future::pending().await,
            }
        };
        let task = tokio::spawn(serve(setup, std::future::pending(), shutdown));
        let control = control.await.expect("the coordinator comes up");
        Serving { control, run_dir, stop, events, task }
    }
}

impl Serving {
    /// How the run ended.
    pub async fn outcome(self) -> Outcome {
        self.task.await.expect("serve does not panic").expect("serve has an outcome")
    }
}
