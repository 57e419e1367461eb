//! The plan of a run, made while somebody waits: long plans are bounded, and summed from a few epochs where they are only
//! shown.

use super::{Error, Result};
use crate::data::{ordering, Dataset};
use crate::monitor::plain::grouped;
use crate::run::plan::Totals;
use crate::serve::work::Work;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::sync::Arc;
use std::time::Duration;
use unisono_configs::model::ModelSpec;
use unisono_configs::run::{Mixing, RunConfig};

/// Steps of the longest run: its plan is walked for minutes before it begins.
const MOST: u64 = 10_000_000;
/// Steps and examples that are walked to show a plan, unless an epoch has more.
const SHOWN: u64 = 20_000;
const SHOWN_EXAMPLES: u64 = 4_000_000;
/// Who waits longer is told for what.
const SILENCE: Duration = Duration::from_secs(2);

/// What is told of a plan.
pub struct Glance {
    pub work: Work,
    pub steps: u64,
    pub totals: Totals,
    /// The totals are those of every step; else they are scaled up from the first ones.
    pub exact: bool,
}

/// The whole work of a run.
pub fn work(dataset: Arc<Dataset>, config: &RunConfig, spec: &ModelSpec) -> Result<Work> {
    let steps = Length::of(&dataset, config)?.steps;
    patiently(steps, || Work::train(dataset, config, spec).map_err(Error::bad_input))
}

/// As much of a run's work as it takes to show it.
pub fn glance(dataset: Arc<Dataset>, config: &RunConfig, spec: &ModelSpec) -> Result<Glance> {
    let Length { steps, per_epoch } = Length::of(&dataset, config)?;
    let most = SHOWN.min(SHOWN_EXAMPLES / config.train.global_batch_size.max(1) as u64).max(1);
    let walked = steps.min((most / per_epoch).max(1).saturating_mul(per_epoch));
    let mut shown = config.clone();
    shown.train.steps = Some(walked);
    let work = patiently(walked, || Work::train(dataset, &shown, spec).map_err(Error::bad_input))?;
    let totals = work.plan().and_then(|plan| plan.totals()).unwrap_or_default();
    let scaled = |sum: u64| u64::try_from(u128::from(sum) * u128::from(steps) / u128::from(walked)).unwrap_or(u64::MAX);
    Ok(Glance {
        work,
        steps,
        // Every epoch has every row once.
        exact: walked == steps || config.mix.by == Mixing::All && steps.is_multiple_of(per_epoch),
        totals: Totals {
            examples: scaled(totals.examples),
            tokens: scaled(totals.tokens),
            target_tokens: scaled(totals.target_tokens),
        },
    })
}

impl Glance {
    /// "1,000 steps over ...", without a full stop.
    pub fn show(&self) -> String {
        let Totals { examples, tokens, target_tokens } = self.totals;
        let about = if self.exact { "" } else { "about " };
        format!(
            "{} steps over {about}{} examples, {about}{} tokens, {about}{} of them targets",
            grouped(self.steps),
            grouped(examples),
            grouped(tokens),
            grouped(target_tokens)
        )
    }
}

/// What in a configuration trains to no end, though nothing is wrong with it.
pub fn warnings(config: &RunConfig, steps: u64) -> Vec<String> {
    let train = &config.train;
    let mut all = Vec::new();
    if train.learning_rate == 0.0 {
        all.push("train.learning_rate = 0: no weight will change".to_owned());
    }
    if train.warmup_steps >= 1.0 && train.warmup_steps >= steps as f64 {
        all.push(format!(
            "train.warmup_steps = {} is not below the run's {} steps, so the learning rate never comes down from its rise; \
             lower it, or set a share of the steps, for example 0.05",
            train.warmup_steps,
            grouped(steps)
        ));
    }
    all
}

struct Length {
    steps: u64,
    per_epoch: u64,
}

impl Length {
    fn of(dataset: &Dataset, config: &RunConfig) -> Result<Self> {
        let train = &config.train;
        let per_epoch = ordering(dataset, config).length.div_ceil(train.global_batch_size.max(1)).max(1) as u64;
        let steps = train.steps.unwrap_or_else(|| train.epochs.saturating_mul(per_epoch));
        match steps <= MOST {
            true => Ok(Length { steps, per_epoch }),
            false => {
                let key = if train.steps.is_some() { "train.steps" } else { "train.epochs" };
                Err(Error::BadInput(format!(
                    "{key} makes {} steps, more than the {} that a run may have; lower it",
                    grouped(steps),
                    grouped(MOST)
                )))
            }
        }
    }
}

/// Does what may take long, and says so when it does.
fn patiently<T>(steps: u64, work: impl FnOnce() -> T) -> T {
    let (done, waiting) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if waiting.recv_timeout(SILENCE) == Err(RecvTimeoutError::Timeout) {
                eprintln!("planning {} steps", grouped(steps));
            }
        });
        let made = work();
        drop(done);
        made
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Example;
    use std::time::Instant;

    fn dataset() -> Arc<Dataset> {
        let row = |row: u64| Example {
            task: 0,
            row,
            tokens: vec![1; 4 + row as usize].into(),
            prompt: 2,
            gaps: Box::default(),
        };
        Arc::new(Dataset::given(vec!["t".into()], (0..10).map(row).collect(), Vec::new(), Vec::new(), 0))
    }

    fn config(set: &[(&str, &str)]) -> (RunConfig, ModelSpec, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2}"#;
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let rows = dir.path().join("rows.jsonl");
        std::fs::write(&rows, "").unwrap();
        let mut overrides = vec![("train.global_batch_size".to_owned(), "4".to_owned())];
        overrides.extend(set.iter().map(|(key, value)| (key.to_string(), value.to_string())));
        let mut config = RunConfig::for_files(dir.path(), &[rows], &overrides).unwrap();
        config.resolve(1, 0, false).unwrap();
        (config, ModelSpec::read(dir.path()).unwrap(), dir)
    }

    #[test]
    fn a_long_plan_is_summed_from_its_first_epochs_and_an_endless_one_refused() {
        let (long, spec, _dir) = config(&[("train.epochs", "1000000")]);
        let begun = Instant::now();
        let shown = glance(dataset(), &long, &spec).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
        let (one, spec, _dir) = config(&[("train.epochs", "1")]);
        let once = glance(dataset(), &one, &spec).unwrap();
        assert_eq!((shown.steps, once.steps, shown.exact, once.exact), (3_000_000, 3, true, true));
        assert_eq!(shown.totals.tokens, once.totals.tokens * 1_000_000);
        assert_eq!(shown.totals.examples, 10_000_000);
        let (uneven, spec, _dir) = config(&[("train.steps", "100001")]);
        assert!(glance(dataset(), &uneven, &spec).unwrap().show().contains("over about "));
        let (endless, spec, _dir) = config(&[("train.steps", "1000000000000")]);
        match (glance(dataset(), &endless, &spec).err(), work(dataset(), &endless, &spec).err()) {
            (Some(Error::BadInput(shown)), Some(Error::BadInput(begun))) => {
                assert!(shown == begun && shown.starts_with("train.steps makes 1,000,000,000,000 steps"), "{shown}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_trains_to_no_end_is_warned_of() {
        let (idle, _, _dir) = config(&[("train.learning_rate", "0"), ("train.warmup_steps", "100")]);
        let said = warnings(&idle, 100);
        assert!(said.len() == 2 && said[0].contains("learning_rate = 0") && said[1].contains("warmup_steps = 100"));
        assert!(warnings(&config(&[("train.warmup_steps", "0.9")]).0, 1).is_empty());
    }
}
