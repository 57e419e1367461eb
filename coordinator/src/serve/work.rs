//! The work of a run: its program for the machine, and the micro-batches that its workers ask for.

use crate::data::{ordering, pack, Ahead, Dataset, Example, Notice};
use crate::run::cost::CostModel;
use crate::run::plan::{Error, Plan, Size};
use crate::run::program::{Program, Training};
use crate::run::schedule::LearningRate;
use crate::run::units::Units;
use std::sync::Arc;
use unisono_configs::model::ModelSpec;
use unisono_configs::run::{RunConfig, Train};
use unisono_proto::put_u32s;
use unisono_proto::v1::{BatchKey, MicroBatch, Suite};

/// What a run does. Cheap to clone.
#[derive(Clone)]
pub struct Work {
    pub(super) program: Program,
    content: Content,
}

#[derive(Clone)]
enum Content {
    Rows(Arc<Dataset>),
    Prompts(Arc<Vec<Vec<u32>>>),
}

impl Work {
    /// Trains on `dataset.train`, validates, and tests once at the end. Walks the whole plan once: about a second for
    /// a million rows.
    pub fn train(dataset: Arc<Dataset>, config: &RunConfig, spec: &ModelSpec) -> Result<Self, Error> {
        let (train, cost) = (&config.train, CostModel::of(spec));
        let plan = Plan::new(dataset.clone(), ordering(&dataset, config), train, cost)?;
        // Without totals, not every row is known yet: the thread that runs ahead tells how far it has come.
        let prepared = if plan.totals().is_some() { plan.steps() } else { 0 };
        let held_out: Vec<Size> = [sizes(&dataset.validation), sizes(&dataset.test)].concat();
        let most = Units::like_training(&held_out, train);
        let program = Program::Train(Training {
            rate: LearningRate::new(train, plan.steps()),
            plan: Arc::new(plan),
            validation: evaluation(Suite::Validation, &dataset, train, cost, most)?,
            test: evaluation(Suite::Test, &dataset, train, cost, most)?,
            eval_every: config.eval.every,
            checkpoint_every: config.checkpoint.every,
            start: 0,
            prepared,
        });
        Ok(Work { program, content: Content::Rows(dataset) })
    }

    /// The same training, of which the first `steps` steps are committed already.
    pub fn after(mut self, steps: u64) -> Self {
        if let Program::Train(training) = &mut self.program {
            training.start = steps;
        }
        self
    }

    /// Evaluates the model as it is on `dataset.validation` or `dataset.test` or both, in the order of `suites`.
    pub fn evaluate(
        dataset: Arc<Dataset>,
        suites: &[Suite],
        config: &RunConfig,
        spec: &ModelSpec,
    ) -> Result<Self, Error> {
        let cost = CostModel::of(spec);
        let units = |&suite: &Suite| Ok((suite, evaluation(suite, &dataset, &config.train, cost, u32::MAX)?));
        let program = Program::Evaluate(suites.iter().map(units).collect::<Result<_, Error>>()?);
        Ok(Work { program, content: Content::Rows(dataset) })
    }

    /// Continues `prompts` (token ids, none empty) greedily by at most `max_new_tokens` or up to one of `end_tokens`.
    pub fn generate(prompts: Vec<Vec<u32>>, max_new_tokens: u32, end_tokens: Vec<u32>, spec: &ModelSpec) -> Self {
        let lengths: Vec<u32> = prompts.iter().map(|p| p.len() as u32).collect();
        let units = Units::prompts(&lengths, max_new_tokens, CostModel::of(spec));
        let program = Program::Generate { units, max_new_tokens, end_tokens };
        Work { program, content: Content::Prompts(Arc::new(prompts)) }
    }

    /// The rows that its plan leads to and that are not tokenized yet, tokenized ahead of it; `None` where there are none.
    pub(super) fn ahead(&self, tell: impl Fn(Notice) -> bool + Send + 'static) -> std::io::Result<Option<Ahead>> {
        match (&self.content, &self.program) {
            (Content::Rows(dataset), Program::Train(training)) if training.prepared < training.plan.steps() => {
                Ahead::spawn(dataset.clone(), training.plan.clone(), training.start, tell).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// The data of a run over rows.
    pub fn dataset(&self) -> Option<&Arc<Dataset>> {
        match &self.content {
            Content::Rows(dataset) => Some(dataset),
            Content::Prompts(_) => None,
        }
    }

    /// The plan of a training run.
    pub fn plan(&self) -> Option<&Plan> {
        match &self.program {
            Program::Train(training) => Some(&training.plan),
            _ => None,
        }
    }

    /// What the program asks of the workers.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Names of the tasks, by index.
    pub(super) fn tasks(&self) -> Vec<String> {
        match &self.content {
            Content::Rows(dataset) => dataset.tasks.clone(),
            Content::Prompts(_) => Vec::new(),
        }
    }

    /// Rows for training, validation and test.
    pub(super) fn rows(&self) -> [u64; 3] {
        match (&self.content, &self.program) {
            (Content::Rows(dataset), program) => {
                let train = if matches!(program, Program::Train(_)) { dataset.train_rows() } else { 0 };
                [train, dataset.validation.len(), dataset.test.len()].map(|n| n as u64)
            }
            (Content::Prompts(_), _) => [0; 3],
        }
    }

    /// Source rows that `steps` steps train on, in the order in which they do.
    pub fn samples(&self, steps: u64) -> Vec<u64> {
        match (&self.content, self.plan()) {
            (Content::Rows(dataset), Some(plan)) => {
                plan.committed_rows(steps).into_iter().map(|row| dataset.source_row(row)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether `trained` is what `steps` steps train on, as [`Work::samples`] has it. Rows that they left out are known to be
    /// left out from then on.
    pub fn recall(&self, steps: u64, trained: &[u64]) -> bool {
        let (Content::Rows(dataset), Some(plan)) = (&self.content, self.plan()) else { return false };
        let left_out = plan.recall(steps, trained, |row| dataset.source_row(row), |row| dataset.may_drop(row));
        left_out.as_deref().inspect(|rows| dataset.leave_out(rows)).is_some()
    }

    /// The micro-batch of `key`, always the same; `None` where the program has no such. An error names the row that its file no
    /// longer has as it was.
    pub fn micro_batch(&self, key: BatchKey) -> Result<Option<MicroBatch>, crate::data::Error> {
        let Some(rows) = self.rows_of(key) else { return Ok(None) };
        Ok(match &self.content {
            Content::Rows(dataset) => {
                let held_out = match key.suite() {
                    Suite::Train => None,
                    Suite::Validation => Some(&dataset.validation),
                    Suite::Test => Some(&dataset.test),
                    _ => return Ok(None),
                };
                if let Some(from) = held_out {
                    let examples: Vec<&Example> = rows.iter().map(|&row| &from[row as usize]).collect();
                    return Ok(Some(pack(&examples).into_micro_batch(key)));
                }
                let read = |&row: &u32| dataset.example(row).map(|found| found.expect("a dealt row is not left out"));
                let examples = rows.iter().map(read).collect::<Result<Vec<Example>, _>>()?;
                Some(pack(&examples.iter().collect::<Vec<_>>()).into_micro_batch(key))
            }
            Content::Prompts(prompts) => {
                let (mut tokens, mut starts, mut start) = (Vec::new(), Vec::new(), 0);
                for prompt in rows.iter().map(|&row| &prompts[row as usize]) {
                    put_u32s(&mut tokens, prompt);
                    put_u32s(&mut starts, &[start]);
                    start += prompt.len() as u32;
                }
                let (tokens, starts) = (tokens.into(), starts.into());
                Some(MicroBatch { key: Some(key), tokens, targets: Default::default(), starts })
            }
        })
    }

    /// The rows of the micro-batch of `key` as people find them: file and line, and the task; held-out rows by their place
    /// among all source rows, as the ledger names them.
    pub fn name_rows(&self, key: BatchKey) -> Vec<String> {
        let (Some(rows), Content::Rows(dataset)) = (self.rows_of(key), &self.content) else { return Vec::new() };
        let held_out = |from: &[Example]| {
            let found = rows.iter().filter_map(|&row| from.get(row as usize));
            found.map(|e| format!("row {} ({})", e.row + 1, dataset.tasks[e.task as usize])).collect()
        };
        match key.suite() {
            Suite::Validation => held_out(&dataset.validation),
            Suite::Test => held_out(&dataset.test),
            _ => {
                let name = |&row: &u32| format!("{} ({})", dataset.place_of(row), dataset.tasks[dataset.task_of(row)]);
                rows.iter().map(name).collect()
            }
        }
    }

    fn rows_of(&self, key: BatchKey) -> Option<Vec<u32>> {
        let index = key.micro_batch as usize;
        let unit = |units: &Units| Some(units.as_slice().get(index)?.work.rows.clone());
        match (&self.program, key.suite()) {
            (Program::Train(training), Suite::Train) => {
                if !(1..=training.plan.steps()).contains(&key.step) {
                    return None;
                }
                Some(training.plan.dealt(key.step).micro_batches.get(index)?.rows.clone())
            }
            (Program::Train(training), Suite::Validation) => unit(&training.validation),
            (Program::Train(training), Suite::Test) => unit(&training.test),
            (Program::Evaluate(suites), suite) => unit(&suites.iter().find(|(s, _)| *s == suite)?.1),
            (Program::Generate { units, .. }, Suite::Generate) => unit(units),
            _ => None,
        }
    }
}

fn evaluation(suite: Suite, dataset: &Dataset, train: &Train, cost: CostModel, most: u32) -> Result<Units, Error> {
    let (name, rows) = match suite {
        Suite::Test => ("test", &dataset.test),
        _ => ("validation", &dataset.validation),
    };
    Units::evaluation(name, &sizes(rows), train, cost, most)
}

fn sizes(examples: &[Example]) -> Vec<Size> {
    let size = |e: &Example| Size { tokens: e.inputs() as u32, targets: e.targets() as u32, task: e.task };
    examples.iter().map(size).collect()
}
