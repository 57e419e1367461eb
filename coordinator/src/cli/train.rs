//! `train`: the supervisor of a run on this machine, or with `--dry-run` a look at what it would do.

use super::config::{workers, ConfigArgs};
use super::screen::{data_lines, Reading};
use super::{check, planned, print, run_dir, shares, Error, Result};
use crate::data::{prepare, Extent};
use crate::launch::local::{self, Ended, Launch};
use crate::launch::signals;
use crate::run::composition::Composition;
use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono train --model models/tiny --data rows.jsonl
  unisono train recipe.toml --workers 2 --set train.epochs=3 --set train.learning_rate=1e-4
  unisono train recipe.toml --json > events.jsonl
  unisono train recipe.toml --trace trace.json
  unisono train --resume runs/recipe-001 --workers 3
  unisono train recipe.toml --resume auto

Exit codes: 0 done, 2 bad input, 3 the run failed, 75 asked to stop (SIGTERM, Ctrl-C, SIGUSR1) and saved within
checkpoint.grace: go on with --resume, 143, 130, 138 ended by those signals before that; a second one ends it at once.")]
pub struct Args {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Directory of the run, which must not exist; default: runs/<name>-<number>
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// Go on with a run that ended, from its newest checkpoint, with any number of workers; auto: with the newest run of
    /// this configuration, or start one; a URL: bring the copy that checkpoint.copy_to made there. A CONFIG beside it may change only train.epochs, train.steps, [gate],
    /// [eval], [checkpoint] and [cluster]
    #[arg(long, value_name = "RUN|auto")]
    resume: Option<String>,
    /// One JSON object per event on standard output
    #[arg(long)]
    json: bool,
    /// Write a timeline of each worker's first ten steps, communication apart from computing, for ui.perfetto.dev. A worker
    /// on another machine writes its own where UNISONO_TRACE names a file. An existing file is refused
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Read the data, say what would be done, and stop; with --json in the words of check --json
    #[arg(long, conflicts_with_all = ["resume", "trace"])]
    dry_run: bool,
}

pub fn run(args: Args) -> Result<()> {
    if args.dry_run {
        return dry_run(&args);
    }
    if let Some(trace) = &args.trace {
        // Nothing is made for a configuration that is refused.
        if args.config.is_given() {
            args.config.load()?;
        }
        begin_trace(trace)?;
    }
    let mut arguments: Vec<OsString> = vec!["coordinator".into()];
    let mut again = arguments.clone();
    if let Some(run_dir) = &args.run_dir {
        arguments.extend(["--run-dir".into(), run_dir.into()]);
    }
    if let Some(resume) = &args.resume {
        arguments.extend(["--resume".into(), resume.into()]);
    }
    if args.json {
        arguments.push("--json".into());
        again.push("--json".into());
    }
    arguments.extend(args.config.arguments());
    let ended = supervise(arguments, again, args.json);
    if let (Some(trace), Err(Error::Code(2) | Error::BadInput(_))) = (&args.trace, &ended) {
        // It was made above, and no worker has written anything.
        let _ = std::fs::remove_file(trace);
    }
    ended
}

/// Begins the file to which workers append, and lets them know of it.
fn begin_trace(path: &Path) -> Result<()> {
    let begin = || {
        File::create_new(path)?.write_all(b"[\n")?;
        path.canonicalize()
    };
    let path = begin().map_err(|problem| match problem.kind() {
        ErrorKind::AlreadyExists => {
            Error::bad_input(format!("{} exists; name another file for --trace, or remove it", path.display()))
        }
        _ => {
            Error::bad_input(format!("{}: the trace cannot be written ({problem}); name another file", path.display()))
        }
    })?;
    std::env::set_var("UNISONO_TRACE", path);
    Ok(())
}

/// Runs this program again as a coordinator with `arguments`, and the workers it asks for, to their end. `again` are the
/// arguments of a coordinator that is started anew on the run that it has made. `events`: what it writes on standard output is one
/// event a line.
pub fn supervise(arguments: Vec<OsString>, again: Vec<OsString>, events: bool) -> Result<()> {
    let program = std::env::current_exe().map_err(Error::failed)?;
    let worker = local::worker_binary(&program).map_err(Error::bad_input)?;
    local::probe(&worker).map_err(Error::bad_input)?;
    match local::run(Launch { program, arguments, again, worker, events }) {
        Ok(Ended::Code(0)) => Ok(()),
        Ok(Ended::Code(code)) => Err(Error::Code(code)),
        Ok(Ended::Interrupted { signal, place, advice }) => {
            let name = signals::name(signal);
            eprintln!("unisono: stopped by {name}{place}; {advice}");
            Err(Error::Code(signals::code(signal)))
        }
        Err(error) if error.bad_input() => Err(Error::bad_input(error)),
        Err(error) => Err(Error::failed(error)),
    }
}

fn dry_run(args: &Args) -> Result<()> {
    if let Some(run_dir) = &args.run_dir {
        run_dir::refuse_existing(run_dir)?;
    }
    if args.json {
        return check::check(check::Args::told(args.config.clone()));
    }
    let (config, spec) = args.config.load()?;
    let dataset = Arc::new(prepare(&config, Extent::All, &Reading::default()).map_err(Error::bad_input)?);
    dataset.reports().iter().for_each(|report| print(&data_lines(report)));
    print(&check::show(&dataset.findings));
    check::refuse(&dataset.findings)?;
    let glance = planned::glance(dataset.clone(), &config, &spec)?;
    let count = workers(&config);
    let plural = if count == 1 { "worker" } else { "workers" };
    print(&format!("plan: {}; {count} {plural}\n", glance.show()));
    check::warn(&config, glance.steps);
    print(&format!("{}\n", shares::tokenized(&dataset.effort())));
    if let Some(plan) = glance.work.plan() {
        let world = u32::try_from(count).unwrap_or(1);
        let last = plan.steps().min(plan.steps_per_epoch());
        let epoch = Composition::of(plan, 1, last, world, config.cluster.assignment, config.train.seed);
        print(&format!("{}\n{}", shares::batches(&epoch), shares::shares(&dataset, &config, &epoch)));
    }
    Ok(())
}
