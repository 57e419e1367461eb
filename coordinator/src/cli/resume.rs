//! `--resume`: which run is meant, what may change, and from which checkpoint it goes on.

use super::config::ConfigArgs;
use super::{run_dir, Error, Result};
use crate::checkpoint::courier;
use crate::checkpoint::disk::Local;
use crate::checkpoint::newest::newest;
use crate::checkpoint::state::{Error as StateError, State};
use crate::run::recorded::Recorded;
use crate::serve::ledger::{Ledger, LEDGER};
use crate::serve::setup::Resumption;
use crate::serve::work::Work;
use crate::store::is_url;
use std::io;
use std::path::{Path, PathBuf};
use unisono_configs::model::Layout;
use unisono_proto::v1::{event::Body, RunDone};

/// The word that names the newest run of the configuration.
const AUTO: &str = "auto";

/// Entries read from the ledger at once.
const PAGE: usize = 1024;

/// The directory of the run that `--resume` means, brought here first where it names a copy elsewhere; `None`: a new run is
/// to be started.
pub fn target(
    resume: Option<&str>,
    wanted: Option<&Path>,
    config: &ConfigArgs,
    adopt: bool,
) -> Result<Option<PathBuf>> {
    if let Some(url) = resume.filter(|resume| is_url(resume)) {
        return bring(url, wanted, adopt).map(Some);
    }
    let found = here(resume, wanted, config)?;
    if found.is_some() || resume != Some(AUTO) {
        return Ok(found);
    }
    // Nothing is here, on a machine that has perhaps just been given: what was copied elsewhere goes on.
    let Some(copies) = config.copy_to()? else { return Ok(None) };
    match courier::newest_run(&copies, &config.name()).map_err(Error::bad_input)? {
        Some(url) => bring(&url, wanted, adopt).map(Some),
        None => Ok(None),
    }
}

/// Brings the newest copy of the run at `url`; `adopt`: a coordinator that died may have brought it already.
fn bring(url: &str, wanted: Option<&Path>, adopt: bool) -> Result<PathBuf> {
    let name = url.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let run_dir = wanted.map_or_else(|| Path::new("runs").join(name), Path::to_owned);
    if adopt && is_run(&run_dir) && courier::is_of(url, &run_dir).map_err(Error::bad_input)? {
        return Ok(run_dir);
    }
    if run_dir.symlink_metadata().is_ok() {
        return Err(Error::BadInput(format!(
            "{0} exists; go on with --resume {0}, or bring the copy elsewhere with --run-dir",
            run_dir.display()
        )));
    }
    if let Some(parent) = run_dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(|error| Error::BadInput(format!("{}: {error}", parent.display())))?;
    }
    let (step, problems) = courier::bring(url, &run_dir).map_err(Error::bad_input)?;
    problems.iter().for_each(|problem| eprintln!("unisono: a copy is not whole, {problem}"));
    eprintln!("brought the checkpoint after step {step} from {url} to {}", run_dir.display());
    Ok(run_dir)
}

/// The directory on this machine.
fn here(resume: Option<&str>, wanted: Option<&Path>, config: &ConfigArgs) -> Result<Option<PathBuf>> {
    let found = match (resume, wanted) {
        (None, _) => return Ok(None),
        (Some(AUTO), _) if !config.is_given() => {
            return Err(Error::bad_input("--resume auto needs the run's configuration beside it; give CONFIG, or --model DIR --data FILE, or name the run: --resume RUN"))
        }
        (Some(AUTO), Some(path)) if path.symlink_metadata().is_err() => return Ok(None),
        (Some(AUTO), Some(path)) => path.to_owned(),
        (Some(AUTO), None) => match run_dir::newest(Path::new("runs"), &config.name()) {
            Some(path) => path,
            None => return Ok(None),
        },
        (Some(""), _) => {
            return Err(Error::bad_input("--resume is empty; give it the directory of a run, for example runs/tiny-001"))
        }
        (Some(_), Some(_)) => {
            return Err(Error::bad_input("--resume RUN and --run-dir both name a directory; leave --run-dir out"))
        }
        (Some(path), None) => PathBuf::from(path),
    };
    match is_run(&found) {
        true => Ok(Some(found)),
        false => Err(Error::BadInput(format!(
            "{}: holds no run ({} and {LEDGER} are missing); give --resume the directory of a run, for example runs/tiny-001",
            found.display(),
            run_dir::CONFIG
        ))),
    }
}

fn is_run(path: &Path) -> bool {
    path.join(run_dir::CONFIG).is_file() && path.join(LEDGER).is_file()
}

/// A run that is gone on with.
pub struct Resumed {
    pub work: Work,
    pub resumption: Resumption,
    /// Its last word, where nothing is left to do.
    pub done: Option<RunDone>,
}

/// Goes on with the run in `run_dir`, which the ledger's lock keeps from others, as far as `work` has been done. Says on
/// standard error from where.
pub fn resume(run_dir: &Path, ledger: Ledger, work: Work, layout: &Layout) -> Result<Resumed> {
    let (recorded, done) = replay(&ledger)?;
    if let Some(plan) = work.plan() {
        recorded.quarantined().iter().for_each(|q| plan.quarantine(q.step, &q.rows));
    }
    let (state, damaged) = newest(&Local, run_dir, ledger.term(), layout).map_err(Error::bad_input)?;
    for bad in &damaged {
        eprintln!("unisono: the checkpoint after step {} is set aside: {}", bad.step, bad.reason);
    }
    let start = match &state {
        None => 0,
        Some(state) => {
            let step = state.manifest.step;
            check(run_dir, state, &work)?;
            step
        }
    };
    drop(state);
    let steps = work.program().steps();
    let done = done.filter(|done| done.steps == steps && start == steps);
    let newest = recorded.newest();
    let run = run_dir.display();
    match (start, done.is_some()) {
        (_, true) => {}
        (0, _) => eprintln!("resuming {run} from the model's weights: it has no checkpoint"),
        _ => eprintln!("resuming {run} from the checkpoint after step {start} of {steps}"),
    }
    if newest > start && start < steps {
        let last = newest.min(steps);
        eprintln!("steps {} to {last} are computed again, and must come out the same", start + 1);
    }
    Ok(Resumed { work: work.after(start), resumption: Resumption { ledger, recorded }, done })
}

/// What the ledger holds, and the run's end if that was its last word.
fn replay(ledger: &Ledger) -> Result<(Recorded, Option<RunDone>)> {
    let reader = ledger.reader().map_err(Error::bad_input)?;
    let (mut recorded, mut done, mut cursor) = (Recorded::default(), None, 0);
    loop {
        let events = reader.after(cursor, PAGE).map_err(Error::bad_input)?;
        let Some(last) = events.last() else { return Ok((recorded, done)) };
        cursor = last.sequence;
        for body in events.iter().filter_map(|event| event.body.as_ref()) {
            match body {
                Body::Done(end) => done = Some(end.clone()),
                Body::Started(_) => done = None,
                body => recorded.note(body),
            }
        }
    }
}

/// The rows that the checkpoint was trained on are those that the plan gives now, so the next one is the right one.
fn check(run_dir: &Path, state: &State, work: &Work) -> Result<()> {
    let cursor = state.manifest.cursor;
    let (step, steps) = (cursor.step, work.program().steps());
    if step > steps {
        return Err(Error::BadInput(format!(
            "{}: the run has done {step} steps already, more than the {steps} of train.steps or train.epochs; raise them",
            run_dir.display()
        )));
    }
    let mut trained: Vec<u64> = Vec::new();
    let read = state.read_samples(&mut |block| {
        trained.extend(block.as_chunks::<8>().0.iter().map(|row| u64::from_le_bytes(*row)));
        Ok(())
    });
    match read {
        Ok(()) | Err(StateError::Sink(_)) => {}
        Err(error) => return Err(Error::bad_input(error)),
    }
    let place = work.plan().map_or((0, 0), |plan| plan.place_after(step));
    match work.recall(step, &trained) && place == (cursor.epoch, cursor.position) {
        true => Ok(()),
        false => Err(Error::BadInput(format!(
            "{}: the data files give other rows than those that the {step} steps so far were trained on; put back the files as they were, or start a new run",
            run_dir.display()
        ))),
    }
}

/// Makes room for the export of a run that went on: an earlier one is moved beside it.
pub fn keep_export(export: &Path, term: u64) -> io::Result<()> {
    match export.symlink_metadata() {
        Ok(_) => std::fs::rename(export, export.with_file_name(format!("export-before-{term}"))),
        Err(_) => Ok(()),
    }
}
