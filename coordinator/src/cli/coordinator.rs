//! `coordinator`: reads the data, serves the run to its workers and leaves digest and export behind.

use super::config::{workers, ConfigArgs};
use super::screen::{data_lines, Reading, Screen, Show};
use super::{check, planned, print, resume, run_dir, shares, Error, Result};
use crate::checkpoint::courier;
use crate::data::{self, Extent};
use crate::launch::report::{Report, Reporter};
use crate::launch::signals::{self, Requests, STOPPED};
use crate::launch::{child, LISTEN_FD};
use crate::monitor::conn;
use crate::monitor::plain::failure;
use crate::monitor::state::RunState;
use crate::monitor::summary::summary;
use crate::run::composition::Composition;
use crate::run::event::{Conclusion, Outcome};
use crate::run::recorded::Recorded;
use crate::serve::ledger::{Ledger, Reader, LEDGER};
use crate::serve::setup::{Conclude, Resumption, Setup, VIEWER_PATIENCE};
use crate::serve::work::Work;
use crate::{digest, export};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use unisono_configs::model::Layout;
use unisono_configs::run::RunConfig;
use unisono_proto::fail_point;
use unisono_proto::v1::Event;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  unisono coordinator recipe.toml --workers 2 --listen 10.0.0.1:7070
  # on each worker's machine, with a copy of the run's worker.token:
  UNISONO_TOKEN_FILE=worker.token unisono-worker join 10.0.0.1:7070

Exit codes: 0 done, 2 bad input, 3 the run failed, 75 asked to stop (SIGTERM, Ctrl-C, SIGUSR1) and saved within
checkpoint.grace: go on with --resume, 143, 130, 138 ended by those signals before that.")]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Address that workers dial, where it is not the one listened on
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
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
    /// With --json: the newest entry of the ledger that was told already, by a coordinator that died
    #[arg(long, hide = true, value_name = "N")]
    told: Option<u64>,
    /// Take over what a coordinator left that died before its run began: --run-dir, or the copy that --resume URL brought
    #[arg(long, hide = true)]
    adopt: bool,
}

pub fn run(args: Args) -> Result<()> {
    let mut reporter = Reporter::from_environment();
    // Bound before the data is read: an address that is taken is known at once.
    let listener = listener(args.listen.as_deref())?;
    check_address(&listener, args.advertise.as_deref())?;
    let resumed = resume::target(args.resume.as_deref(), args.run_dir.as_deref(), &args.config, args.adopt)?;
    let (config, spec) = match &resumed {
        Some(run_dir) => args.config.load_again(run_dir)?,
        None => args.config.load()?,
    };
    // Said before the data is read, which may take minutes; making the directory is what decides.
    let adopted = args.run_dir.as_deref().filter(|path| args.adopt && run_dir::is_unborn(path));
    if resumed.is_none() && adopted.is_none() {
        args.run_dir.as_deref().map_or(Ok(()), run_dir::refuse_existing)?;
    }
    // A run that goes on does so without its copies too: a store that is away for a while ends nothing.
    if let (Some(url), None) = (&config.checkpoint.copy_to, &resumed) {
        courier::probe(url).map_err(|error| Error::BadInput(format!("checkpoint.copy_to: {error}")))?;
    }
    // Locks the run: nobody else serves it while its checkpoints are looked at.
    let ledger = resumed.as_deref().map(Ledger::open).transpose().map_err(Error::bad_input)?;
    fail_point::reached("read");
    let dataset = data::prepare(&config, Extent::Start, &Reading::default()).map_err(Error::bad_input)?;
    dataset.reports().iter().for_each(|report| eprint!("{}", data_lines(report)));
    if resumed.is_none() {
        eprint!("{}", check::show(&dataset.findings));
        check::refuse(&dataset.findings)?;
    }
    let work = planned::work(Arc::new(dataset), &config, &spec)?;
    if let (Some(plan), true) = (work.plan(), resumed.is_none()) {
        check::warn(&config, plan.steps());
    }
    let again = resumed.is_some();
    let (run_dir, work, resumption) = match (resumed, ledger) {
        (Some(run_dir), Some(ledger)) => {
            let resumed = resume::resume(&run_dir, ledger, work, &Layout::new(&spec))?;
            if let Some(done) = resumed.done {
                if let (true, Some(told)) = (args.json, args.told) {
                    tell_rest(&run_dir, told)?;
                }
                finish_copies(&config, &run_dir, done.steps);
                eprintln!("{} is finished: {} steps, digest {}", run_dir.display(), done.steps, done.digest);
                return Ok(());
            }
            if let Some(url) = &config.checkpoint.copy_to {
                match courier::claim(url, &run_dir) {
                    Ok(true) => {}
                    Ok(false) => return Err(Error::BadInput(taken(url, &run_dir))),
                    Err(error) => tracing::warn!(%error, "whose copies are in checkpoint.copy_to is not known"),
                }
            }
            run_dir::record(&run_dir, &config)?;
            (run_dir, resumed.work, resumed.resumption)
        }
        // Last, so that a refused run leaves no directory.
        _ => {
            let free = |run_dir: &Path| match &config.checkpoint.copy_to {
                Some(url) => courier::claim(url, run_dir).map_err(Error::bad_input),
                None => Ok(true),
            };
            let run_dir = match adopted {
                // Where its copies go, whoever made it has claimed already, or nobody has.
                Some(path) => free(path).map(|_| path.to_path_buf())?,
                None => run_dir::create(args.run_dir.as_deref(), &args.config.name(), &free)?,
            };
            fail_point::reached("run-dir");
            run_dir::record(&run_dir, &config)?;
            let ledger = Ledger::open(&run_dir).inspect_err(|_| run_dir::withdraw(&run_dir));
            (run_dir, work, Resumption { ledger: ledger.map_err(Error::bad_input)?, recorded: Recorded::default() })
        }
    };
    // A path that holds wherever the coordinator is started again.
    let entries = resumption.ledger.sequence();
    reporter.send(&Report::Created { run_dir: run_dir.canonicalize().map_err(Error::failed)?, entries });
    let show = if args.json { Show::Events { told: args.told.unwrap_or(entries) } } else { Show::Progress };
    let screen = Arc::new(Screen::new(reporter, &run_dir, &config.cluster, show));
    let term = again.then(|| resumption.ledger.term());
    let conclude = conclude(config.clone(), run_dir.clone(), term);
    let told = Told { work: work.clone(), config: config.clone() };
    let setup = Setup {
        listener,
        advertise: args.advertise,
        run_dir: run_dir.clone(),
        config,
        spec,
        work,
        observer: screen.clone(),
        viewer_patience: VIEWER_PATIENCE,
        resume: Some(resumption),
        conclude: Some(conclude),
    };
    fail_point::reached("serve");
    if let Err(error) = serve(setup, &screen) {
        if matches!(error, Error::BadInput(_)) && term.is_none() {
            run_dir::withdraw(&run_dir);
        }
        return Err(error);
    }
    let state = screen.finish(None);
    let (lines, events) = told.after(&state);
    let text = last_screen(&state, &lines, &run_dir);
    match args.json {
        true => {
            events.iter().for_each(|event| print(&format!("{event}\n")));
            eprint!("{text}");
        }
        false => print(&text),
    }
    Ok(())
}

/// The coordinator that finished the run may have died before its last checkpoint was copied, and before it took away what
/// leads to nobody any more. What cannot be copied now is said, and changes nothing about the run.
fn finish_copies(config: &RunConfig, run_dir: &Path, step: u64) {
    crate::serve::forget(run_dir);
    let Some(url) = &config.checkpoint.copy_to else { return };
    let ledger = run_dir.join(LEDGER);
    let snapshot =
        move |to: &Path| Reader::open(&ledger).and_then(|reader| reader.copy_to(to)).map_err(|error| error.to_string());
    let copied = match courier::claim(url, run_dir) {
        Ok(true) => courier::copy_last(url, run_dir, step, config.checkpoint.keep, Box::new(snapshot)),
        Ok(false) => Err(taken(url, run_dir)),
        Err(error) => Err(error.to_string()),
    };
    if let Err(problem) = copied {
        eprintln!("unisono: the checkpoint after step {step} is not copied: {problem}");
    }
}

/// What a coordinator that died had written down and not told.
fn tell_rest(run_dir: &Path, told: u64) -> Result<()> {
    let mut state = RunState::after(told);
    let tell = &mut |event: &Event| print(&format!("{}\n", serde_json::Value::Object(event.to_json())));
    conn::replay(run_dir, &mut state, tell).map_err(Error::failed)
}

fn taken(url: &str, run_dir: &Path) -> String {
    let name = run_dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    format!("checkpoint.copy_to: {url}/{name} holds the copies of another run; choose another checkpoint.copy_to")
}

/// What is told of a run's rows when it is over.
struct Told {
    work: Work,
    config: RunConfig,
}

impl Told {
    /// For people and for scripts. Of the steps that this process saw: those before a resumption were told then.
    fn after(&self, state: &RunState) -> (String, Vec<String>) {
        let (Some(dataset), Some(plan)) = (self.work.dataset(), self.work.plan()) else { return Default::default() };
        let effort = dataset.effort();
        let mut lines = format!("rows        {}\n", shares::tokenized(&effort));
        let mut events = vec![shares::tokenized_json(&effort)];
        let steps = state.first_step.as_ref().zip(state.last_step.as_ref());
        if let Some((first, last)) = steps {
            let world = u32::try_from(workers(&self.config)).unwrap_or(1);
            let (assignment, seed) = (self.config.cluster.assignment, self.config.train.seed);
            let composition = Composition::of(plan, first.step, last.step, world, assignment, seed);
            lines += &format!("batches     {}\n", shares::batches(&composition));
            lines += &shares::shares(dataset, &self.config, &composition);
            events.push(shares::batches_json(dataset, &self.config, &composition));
        }
        (lines, events)
    }
}

/// The socket that the supervisor holds, else one of our own.
pub fn listener(address: Option<&str>) -> Result<TcpListener> {
    if let Some(fd) = child::inherited(LISTEN_FD) {
        return Ok(fd.into());
    }
    let Some(address) = address else {
        return Err(Error::bad_input("--listen HOST:PORT is missing; for example --listen 10.0.0.1:7070, or --listen 0.0.0.0:7070 --advertise node1:7070"));
    };
    TcpListener::bind(address).map_err(|error| {
        Error::BadInput(format!("--listen {address}: {error}; choose a free host:port of this machine"))
    })
}

/// Workers are told where to dial, and nobody can dial "any address".
fn check_address(listener: &TcpListener, advertise: Option<&str>) -> Result<()> {
    let address = listener.local_addr().map_err(Error::failed)?;
    match advertise.is_none() && address.ip().is_unspecified() {
        false => Ok(()),
        true => Err(Error::BadInput(format!(
            "--listen {address} does not say how workers reach this machine; add --advertise HOST:{}",
            address.port()
        ))),
    }
}

/// Serves to the end. A failed or interrupted run is an error.
pub fn serve(setup: Setup, screen: &Screen) -> Result<Outcome> {
    let (supervised, trains) = (screen.supervised(), setup.work.plan().is_some());
    // Whoever does not read what is told holds no stop up for longer.
    let grace = Some(Duration::from_secs_f64(setup.config.checkpoint.grace));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Error::failed)?;
    let caught = Arc::new(AtomicI32::new(0));
    let outcome = runtime.block_on(async {
        let (asked, mut first) = watch::channel(0);
        let mut second = asked.subscribe();
        let mut requests = Requests::new().map_err(Error::failed)?;
        let first_signal = caught.clone();
        tokio::spawn(async move {
            loop {
                let signal = requests.next().await;
                first_signal.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst).ok();
                asked.send_modify(|signals| *signals += 1);
            }
        });
        let caught = caught.clone();
        let interrupt = async move {
            first.wait_for(|signals| *signals > 0).await.ok();
            signals::name(caught.load(Ordering::SeqCst)).to_owned()
        };
        let stop = async move {
            // A group's signal reaches supervisor and coordinator alike: how often it was sent, only the supervisor knows.
            if supervised || second.wait_for(|signals| *signals > 1).await.is_err() {
                std::future::pending::<()>().await;
            }
            "it was asked a second time to stop".to_owned()
        };
        crate::serve::serve(setup, interrupt, stop).await.map_err(Error::failed)
    })?;
    if let Some(stopped) = &outcome.stopped {
        screen.finish(grace);
        eprintln!("unisono: {}", stopped.message);
        let saved = trains && stopped.step == stopped.checkpoint;
        return Err(Error::Code(if saved { STOPPED } else { signals::code(caught.load(Ordering::SeqCst)) }));
    }
    match (&outcome.failure, caught.load(Ordering::SeqCst)) {
        (None, _) => Ok(outcome),
        (Some(failed), number) if number != 0 => {
            screen.finish(grace);
            eprintln!("unisono: {}", failure(failed));
            Err(Error::Code(signals::code(number)))
        }
        (Some(failed), _) => {
            screen.finish(grace);
            let sentence = failure(failed);
            Err(if failed.bad_input { Error::BadInput(sentence) } else { Error::Failed(sentence) })
        }
    }
}

/// What a finished training run leaves behind: its digest, and a Hugging Face directory. `resumed`: in which term of the
/// coordinator, if the run was resumed.
fn conclude(config: RunConfig, run_dir: PathBuf, resumed: Option<u64>) -> Conclude {
    Box::new(move |checkpoint: &Path| {
        let digest = digest::digest(checkpoint).map_err(|error| error.to_string())?;
        let out = run_dir.join("export");
        if let Some(term) = resumed {
            resume::keep_export(&out, term).map_err(|error| format!("{}: cannot be moved ({error})", out.display()))?;
        }
        let request = export::Request { config: &config, checkpoint, out: &out, digest: &digest };
        let exported = export::export(request).map_err(|error| error.to_string())?;
        Ok(Conclusion { export: exported.path.display().to_string(), digest })
    })
}

fn last_screen(state: &RunState, rows: &str, run_dir: &Path) -> String {
    let run = run_dir.display();
    let mut out = format!("\n{}{rows}", summary(state));
    out += &format!("\nrun         {run}\n");
    if let Some(done) = state.done.as_ref().filter(|d| !d.export.is_empty()) {
        out += &format!("export      {}\n", done.export);
    }
    out += &format!("\nNext:\n  unisono generate {run} --prompt \"...\"\n  unisono digest {run}\n");
    out
}
