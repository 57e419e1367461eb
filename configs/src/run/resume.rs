//! What may change when a run goes on: only what cannot make it another run.

use super::{Error, RunConfig};
use toml::{Table, Value};

/// Sections and keys that may change.
const FREE: &[&str] = &[
    "train.epochs",
    "train.steps",
    "train.spike_mads",
    "train.spike_window",
    "train.on_spike",
    "train.on_bad_numbers",
    "gate",
    "tokens",
    "eval",
    "checkpoint",
    "cluster",
];

/// Keys of those sections that decide the bits.
const FIXED: &[&str] = &["cluster.threads_per_worker", "cluster.device"];

impl RunConfig {
    /// Refuses to go on as `wanted` with a run that was recorded as `self`, where that would be another run. Both are
    /// resolved. `place` says where `wanted` comes from.
    pub fn check_resume(&self, wanted: &RunConfig, place: &str) -> Result<(), Error> {
        let table = |config: &RunConfig| Table::try_from(config).expect("every value has a TOML form");
        let (old, new) = (Value::Table(table(self)), Value::Table(table(wanted)));
        let Some((field, old, new)) = changed("", Some(&old), Some(&new)) else { return Ok(()) };
        let problem = format!(
            "was {old} in the run and is {new} now; set it back, or start a new run (only train.epochs, train.steps, [gate], [tokens], [eval], [checkpoint] and [cluster] without threads_per_worker and device may change)"
        );
        Err(Error::Field { place: place.into(), field, problem })
    }
}

/// The first key that differs and must not, with both values.
fn changed(path: &str, old: Option<&Value>, new: Option<&Value>) -> Option<(String, String, String)> {
    if old == new {
        return None;
    }
    let free = |key: &str| path == key || path.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
    if FREE.iter().any(|key| free(key)) && !FIXED.iter().any(|key| key.starts_with(path)) {
        return None;
    }
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match (old, new) {
        (Some(Value::Table(a)), Some(Value::Table(b))) => {
            let more = b.keys().filter(|key| !a.contains_key(*key));
            a.keys().chain(more).find_map(|key| changed(&below(key), a.get(key), b.get(key)))
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) if a.len() == b.len() => {
            (0..a.len()).find_map(|i| changed(&below(&i.to_string()), a.get(i), b.get(i)))
        }
        _ => Some((path.to_owned(), show(old), show(new))),
    }
}

fn show(value: Option<&Value>) -> String {
    match value {
        None => "not set".into(),
        Some(Value::Array(list)) => format!("a list of {}", list.len()),
        Some(Value::Table(_)) => "a table".into(),
        Some(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{Count, Held};
    use std::path::Path;

    fn config() -> RunConfig {
        let files = ["a.jsonl".into(), "b.jsonl".into()];
        let mut config = RunConfig::for_files(Path::new("model"), &files, &[]).unwrap();
        config.resolve(4, 0, true).unwrap();
        config
    }

    #[test]
    fn what_cannot_change_the_rows_or_the_bits_may_change() {
        let (recorded, mut wanted) = (config(), config());
        wanted.train.epochs = 3;
        wanted.train.steps = Some(7);
        wanted.cluster.workers = Count::Exactly(3);
        wanted.cluster.peer_timeout = 5.0;
        wanted.eval.every = 1;
        wanted.checkpoint.keep = 9;
        recorded.check_resume(&wanted, "x.toml").unwrap();
    }

    #[test]
    fn every_other_change_is_refused_by_name() {
        type Change = fn(&mut RunConfig);
        let changes: [(&str, Change); 7] = [
            ("train.learning_rate", |c| c.train.learning_rate = 0.5),
            ("train.seed", |c| c.train.seed = 9),
            ("model.path", |c| c.model.path = "/elsewhere".into()),
            ("data.1.validation", |c| c.data[1].validation = Some(Held::Share(0.5))),
            ("data", |c| c.data.truncate(1)),
            ("cluster.threads_per_worker", |c| c.cluster.threads_per_worker = 2),
            ("split.test", |c| c.split.test = 0.25),
        ];
        for (field, change) in changes {
            let mut wanted = config();
            // Allowed beside it, so what is named is the other.
            wanted.train.epochs = 3;
            change(&mut wanted);
            let told = config().check_resume(&wanted, "x.toml").unwrap_err().to_string();
            assert!(told.starts_with(&format!("x.toml: {field}: was ")), "{told}");
        }
    }
}
