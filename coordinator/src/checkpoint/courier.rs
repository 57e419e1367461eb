//! Copies committed checkpoints to a store behind training, so that a run outlives the machine that holds its directory.
//!
//! Below `<store>/<run>/checkpoints/step-…/` go a checkpoint's files, the ledger and the configuration as they were then (their
//! names hold their hash), and at last the manifest, created if absent: that alone makes the copy one. `<store>/<run>/RUN` says
//! whose copies they are, so that no two runs of one name ever mix. Only the newest waits: where the store is slower than the
//! saves come, those between are not copied.

use super::commit::is_plain;
use super::manifest::{self, Manifest, MANIFEST};
use crate::store::{Error as StoreError, Store};
use rustls::crypto::ring;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Who the copies in a store belong to, there and in the run's directory.
const OWNER: &str = "RUN";

/// Names of the two files of the run that go with each copy.
const LEDGER: &str = "ledger";
const CONFIG: &str = "config";

/// Why a checkpoint is not copied, or not brought back. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{url}: {source}")]
    Store { url: String, source: StoreError },
    #[error("{path}: cannot be copied ({source})")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{url}: holds no checkpoint of a run; give the URL of one run, as <checkpoint.copy_to>/<name>-001")]
    Nothing { url: String },
    #[error("{url}: no checkpoint there is whole: {problems}")]
    Damaged { url: String, problems: String },
}

/// Puts the ledger as it is now into a file of its own.
pub type Snapshot = Box<dyn Fn(&Path) -> Result<(), String> + Send>;

/// A checkpoint to be copied: its files are open, so that their deletion changes nothing.
struct Parcel {
    step: u64,
    manifest: Vec<u8>,
    /// Name, content, and its hash as the manifest has it.
    files: Vec<(String, File, String)>,
}

#[derive(Default)]
struct Desk {
    waiting: Option<Parcel>,
    busy: bool,
    closed: bool,
    /// Grows with every block that is copied.
    progress: u64,
}

/// However the courier's thread ends, nobody waits for it any more.
struct AtItsEnd(Arc<(Mutex<Desk>, Condvar)>);

impl Drop for AtItsEnd {
    fn drop(&mut self) {
        let mut desk = self.0 .0.lock().unwrap_or_else(PoisonError::into_inner);
        (desk.busy, desk.closed, desk.waiting) = (false, true, None);
        self.0 .1.notify_all();
    }
}

/// Takes checkpoints and copies them, one after another, on a thread of its own.
pub struct Courier {
    desk: Arc<(Mutex<Desk>, Condvar)>,
    run_dir: PathBuf,
}

impl Courier {
    /// Copies to `url`, below the name of `run_dir`, and keeps the newest `keep` there. `tell` hears of each copy: its step
    /// and seconds, or what went wrong.
    pub fn spawn(
        url: &str,
        run_dir: &Path,
        keep: usize,
        snapshot: Snapshot,
        tell: impl Fn(u64, Result<f64, String>) + Send + 'static,
    ) -> Result<Self, Error> {
        let url = url_of(url, run_dir);
        let store = Store::open(&url).map_err(|source| Error::Store { url: url.clone(), source })?;
        let desk: Arc<(Mutex<Desk>, Condvar)> = Arc::default();
        let (taken, from) = (desk.clone(), run_dir.to_owned());
        let work = move || {
            let at_its_end = AtItsEnd(taken);
            let progress = |_| at_its_end.0 .0.lock().unwrap_or_else(PoisonError::into_inner).progress += 1;
            while let Some(mut parcel) = next(&at_its_end.0) {
                let begun = Instant::now();
                let copied = copy(&store, &from, &mut parcel, &snapshot, keep, &progress);
                let seconds = begun.elapsed().as_secs_f64();
                tell(parcel.step, copied.map(|()| seconds).map_err(|problem| format!("{url}: {problem}")));
            }
        };
        let spawned = std::thread::Builder::new().name("courier".into()).spawn(work);
        spawned.map_err(|source| Error::File { path: run_dir.into(), source })?;
        Ok(Courier { desk, run_dir: run_dir.into() })
    }

    /// Takes the checkpoint after `step`, which is committed.
    pub fn take(&self, step: u64) -> Result<(), Error> {
        let directory = manifest::directory(&self.run_dir, step);
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { path, source }
        };
        let path = directory.join(MANIFEST);
        let content = std::fs::read(&path).map_err(fail(&path))?;
        let parsed = Manifest::parse(&content, &path);
        let parsed = parsed.map_err(|error| fail(&path)(std::io::Error::other(error.to_string())))?;
        let open = |entry: &manifest::File| {
            let path = directory.join(&entry.name);
            File::open(&path).map(|file| (entry.name.clone(), file, entry.blake3.clone())).map_err(fail(&path))
        };
        let files = parsed.files.iter().map(open).collect::<Result<_, _>>()?;
        let mut desk = self.desk.0.lock().unwrap_or_else(PoisonError::into_inner);
        if desk.closed {
            let source = std::io::Error::other("the thread that copies is gone");
            return Err(Error::File { path: directory, source });
        }
        desk.waiting = Some(Parcel { step, manifest: content, files });
        self.desk.1.notify_all();
        Ok(())
    }

    /// Waits until everything taken is copied, at most `patience`; whether it is.
    pub fn wait(&self, patience: Duration) -> bool {
        let desk = self.desk.0.lock().unwrap_or_else(PoisonError::into_inner);
        let under_way = |desk: &mut Desk| desk.busy || desk.waiting.is_some();
        let waited = self.desk.1.wait_timeout_while(desk, patience, under_way);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

impl Courier {
    /// Waits until everything taken is copied, as long as there is progress; whether it is.
    pub fn finish(&self) -> bool {
        /// A store in which nothing moves for so long is given up.
        const STILL: Duration = Duration::from_secs(300);
        let progress = || self.desk.0.lock().unwrap_or_else(PoisonError::into_inner).progress;
        loop {
            let before = progress();
            if self.wait(STILL) {
                return true;
            }
            if progress() == before {
                return false;
            }
        }
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        self.desk.0.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.desk.1.notify_all();
    }
}

/// Writes something small to `url` and deletes it: whether copies can be made is known before a run begins.
pub fn probe(url: &str) -> Result<(), Error> {
    let fail = |source| Error::Store { url: url.into(), source };
    let store = Store::open(url).map_err(fail)?;
    let name = format!(".unisono-was-here-{}", std::process::id());
    store.create(&name, b"It may be deleted.\n".to_vec()).map_err(fail)?;
    store.delete(&name).map_err(fail)
}

/// Copies the last checkpoint of a run that is finished, unless that was done.
pub fn copy_last(url: &str, run_dir: &Path, step: u64, keep: usize, snapshot: Snapshot) -> Result<(), String> {
    let (tell, told) = std::sync::mpsc::channel();
    let hear = move |_, copied: Result<f64, String>| drop(tell.send(copied));
    let courier = Courier::spawn(url, run_dir, keep, snapshot, hear).map_err(|error| error.to_string())?;
    courier.take(step).map_err(|error| error.to_string())?;
    match courier.finish() {
        true => told.try_iter().last().unwrap_or(Ok(0.0)).map(drop),
        false => Err(format!("{url}: nothing moves there")),
    }
}

/// Whether the run in `run_dir` is the one whose copies are at `url`.
pub fn is_of(url: &str, run_dir: &Path) -> Result<bool, Error> {
    let fail = |source| Error::Store { url: url.into(), source };
    let Ok(own) = std::fs::read(run_dir.join(OWNER)) else { return Ok(false) };
    match Store::open(url).map_err(fail)?.get(OWNER) {
        Ok(owner) => Ok(owner == own),
        Err(error) if error.is_absence() => Ok(false),
        Err(error) => Err(fail(error)),
    }
}

/// Where the copies of the run in `run_dir` are.
fn url_of(url: &str, run_dir: &Path) -> String {
    let name = run_dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{}/{name}", url.trim_end_matches('/'))
}

/// Makes the place of the copies below `url` that of the run in `run_dir`, a new one or one that owns it already; false: it is
/// another's.
pub fn claim(url: &str, run_dir: &Path) -> Result<bool, Error> {
    let url = url_of(url, run_dir);
    let fail = |source| Error::Store { url: url.clone(), source };
    let path = run_dir.join(OWNER);
    let io = |source| Error::File { path: path.clone(), source };
    if !path.exists() {
        let mut name = [0; 16];
        ring::default_provider().secure_random.fill(&mut name).expect("the system has a source of randomness");
        let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        std::fs::write(&path, name).map_err(io)?;
    }
    let own = std::fs::read(&path).map_err(io)?;
    let store = Store::open(&url).map_err(fail)?;
    Ok(store.create(OWNER, own.clone()).map_err(fail)? || store.get(OWNER).map_err(fail)? == own)
}

/// The next parcel; `None` when nobody brings any more.
fn next(desk: &(Mutex<Desk>, Condvar)) -> Option<Parcel> {
    let mut inner = desk.0.lock().unwrap_or_else(PoisonError::into_inner);
    inner.busy = false;
    desk.1.notify_all();
    let idle = |desk: &mut Desk| desk.waiting.is_none() && !desk.closed;
    inner = desk.1.wait_while(inner, idle).unwrap_or_else(PoisonError::into_inner);
    inner.busy = inner.waiting.is_some();
    inner.waiting.take()
}

fn directory(step: u64) -> String {
    format!("checkpoints/step-{step:08}")
}

fn copy(
    store: &Store,
    run_dir: &Path,
    parcel: &mut Parcel,
    snapshot: &Snapshot,
    keep: usize,
    progress: &dyn Fn(u64),
) -> Result<(), String> {
    let at = directory(parcel.step);
    // The same checkpoint may have been copied before its coordinator died.
    if matches!(store.get(&format!("{at}/{MANIFEST}")), Ok(there) if there == parcel.manifest) {
        return Ok(());
    }
    for (name, file, expected) in &mut parcel.files {
        let (_, hash) = store.upload(&format!("{at}/{name}"), file, progress).map_err(|e| format!("{name} {e}"))?;
        if hash.to_hex().as_str() != expected {
            return Err(format!("{name} does not have the hash that the manifest gives; the disk has damaged it"));
        }
    }
    let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
    let ledger = scratch.path().join(LEDGER);
    snapshot(&ledger)?;
    for (kind, path) in [(LEDGER, ledger), (CONFIG, run_dir.join("config.toml"))] {
        let fail = |error: std::io::Error| format!("{} cannot be copied ({error})", path.display());
        let mut file = File::open(&path).map_err(fail)?;
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut file, &mut hasher).map_err(fail)?;
        let name = format!("{at}/{kind}-{}", hasher.finalize().to_hex());
        let mut file = File::open(&path).map_err(fail)?;
        store.upload(&name, &mut file, progress).map_err(|e| format!("{name} {e}"))?;
    }
    let manifest = format!("{at}/{MANIFEST}");
    let create = || store.create(&manifest, parcel.manifest.clone()).map_err(|e| e.to_string());
    if !create()? && store.get(&manifest).map_err(|e| e.to_string())? != parcel.manifest {
        // An earlier attempt's of the same step and run, whose state has the same bits. It went on from an older one, so this
        // one may be damaged.
        store.delete(&manifest).map_err(|e| e.to_string())?;
        if !create()? {
            return Err("somebody else copies there too; end one of the two runs".into());
        }
    }
    retain(store, keep).map_err(|e| e.to_string())
}

/// Deletes all but the newest `keep` copies, the manifest first, and what of older ones never became a copy.
fn retain(store: &Store, keep: usize) -> Result<(), StoreError> {
    let copies = copies(store)?;
    let whole: Vec<u64> =
        copies.iter().filter(|(_, names)| names.iter().any(|n| n == MANIFEST)).map(|(s, _)| *s).collect();
    let Some(&oldest) = whole.iter().rev().nth(keep.max(1) - 1).or(whole.first()) else { return Ok(()) };
    for (step, names) in copies.iter().filter(|(step, _)| **step < oldest) {
        let first = names.iter().filter(|name| *name == MANIFEST);
        for name in first.chain(names.iter().filter(|name| *name != MANIFEST)) {
            store.delete(&format!("{}/{name}", directory(*step)))?;
        }
    }
    Ok(())
}

/// Names of the objects of each step.
fn copies(store: &Store) -> Result<BTreeMap<u64, Vec<String>>, StoreError> {
    let mut copies: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for (name, _) in store.list("checkpoints")? {
        let parts: Vec<&str> = name.split('/').collect();
        let [_, step, file] = parts[..] else { continue };
        let Some(Ok(step)) = step.strip_prefix("step-").map(str::parse) else { continue };
        copies.entry(step).or_default().push(file.to_owned());
    }
    Ok(copies)
}

/// The newest run called `<name>-<number>` below `url` that has a copy; its URL.
pub fn newest_run(url: &str, name: &str) -> Result<Option<String>, Error> {
    let url = url.trim_end_matches('/');
    let fail = |source| Error::Store { url: url.into(), source };
    let store = Store::open(url).map_err(fail)?;
    let number = |object: &str| -> Option<(u64, String)> {
        let mut parts = object.split('/');
        let run = parts.next()?;
        let number = run.strip_prefix(name)?.strip_prefix('-')?.parse().ok()?;
        (parts.next_back() == Some(MANIFEST)).then(|| (number, run.to_owned()))
    };
    let found = store.list("").map_err(fail)?.into_iter().filter_map(|(object, _)| number(&object)).max();
    Ok(found.map(|(_, run)| format!("{url}/{run}")))
}

/// What is wrong with a copy.
enum Flaw {
    /// It is not whole.
    Damaged(String),
    /// It may be: the store could not be read, or this disk not be written.
    Unknown(Error),
}

/// Brings the newest whole copy of the run at `url` into `run_dir`, which must not exist: checkpoint, ledger and
/// configuration. Its step, and what was wrong with newer ones.
pub fn bring(url: &str, run_dir: &Path) -> Result<(u64, Vec<String>), Error> {
    let fail = |source| Error::Store { url: url.into(), source };
    let store = Store::open(url).map_err(fail)?;
    let copies = copies(&store).map_err(fail)?;
    // Under its own name only when it is whole.
    let name = run_dir.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let partial = run_dir.with_file_name(format!(".{name}.partial"));
    let clear = || match std::fs::remove_dir_all(&partial) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::File { path: partial.clone(), source })
        }
        _ => Ok(()),
    };
    let mut problems = Vec::new();
    for (&step, names) in copies.iter().rev().filter(|(_, names)| names.iter().any(|n| n == MANIFEST)) {
        clear()?;
        match bring_one(&store, url, step, names, &partial) {
            Ok(()) => {
                let moved = std::fs::rename(&partial, run_dir).and_then(|()| sync(run_dir.parent()));
                moved.map_err(|source| Error::File { path: run_dir.into(), source })?;
                return Ok((step, problems));
            }
            Err(Flaw::Damaged(problem)) => problems.push(format!("that after step {step}: {problem}")),
            Err(Flaw::Unknown(error)) => {
                clear()?;
                return Err(error);
            }
        }
    }
    clear()?;
    match problems.is_empty() {
        true => Err(Error::Nothing { url: url.into() }),
        false => Err(Error::Damaged { url: url.into(), problems: problems.join("; ") }),
    }
}

/// Makes the names in a directory durable.
fn sync(directory: Option<&Path>) -> std::io::Result<()> {
    match directory.filter(|d| !d.as_os_str().is_empty()) {
        Some(directory) => File::open(directory)?.sync_all(),
        None => File::open(".")?.sync_all(),
    }
}

fn bring_one(store: &Store, url: &str, step: u64, names: &[String], run_dir: &Path) -> Result<(), Flaw> {
    let to = manifest::directory(run_dir, step);
    let at = directory(step);
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| Flaw::Unknown(Error::File { path, source })
    };
    let flaw = |name: &str| {
        let name = name.to_owned();
        move |error: StoreError| match error.is_absence() {
            true => Flaw::Damaged(format!("{name} is missing")),
            false => Flaw::Unknown(Error::Store { url: url.into(), source: error }),
        }
    };
    std::fs::create_dir_all(&to).map_err(io(&to))?;
    let content = store.get(&format!("{at}/{MANIFEST}")).map_err(flaw(MANIFEST))?;
    let parsed = Manifest::parse(&content, &to.join(MANIFEST)).map_err(|e| Flaw::Damaged(e.to_string()))?;
    for file in &parsed.files {
        if !is_plain(&file.name) {
            return Err(Flaw::Damaged(format!("names a file {:?} outside of the checkpoint", file.name)));
        }
        let hash = store.download(&format!("{at}/{}", file.name), &to.join(&file.name)).map_err(flaw(&file.name))?;
        if hash.to_hex().as_str() != file.blake3 {
            return Err(Flaw::Damaged(format!("{} does not have the hash that the manifest gives", file.name)));
        }
    }
    for (kind, path) in [(LEDGER, run_dir.join("ledger.sqlite")), (CONFIG, run_dir.join("config.toml"))] {
        // Several where the same step was copied more than once: each is as good as its hash.
        let found = names.iter().filter_map(|n| Some((n, n.strip_prefix(kind)?.strip_prefix('-')?)));
        let mut brought = false;
        for (name, hash) in found {
            let is = store.download(&format!("{at}/{name}"), &path).map_err(flaw(name))?;
            brought = is.to_hex().as_str() == hash;
            if brought {
                break;
            }
            std::fs::remove_file(&path).map_err(io(&path))?;
        }
        if !brought {
            return Err(Flaw::Damaged(format!("its {kind} is missing or damaged")));
        }
    }
    match store.get(OWNER) {
        Ok(owner) => std::fs::write(run_dir.join(OWNER), owner).map_err(io(run_dir))?,
        Err(error) if error.is_absence() => {}
        Err(error) => return Err(flaw(OWNER)(error)),
    }
    let write = || {
        let mut file = File::create_new(to.join(MANIFEST))?;
        std::io::Write::write_all(&mut file, &content)?;
        file.sync_all()?;
        [Some(to.as_path()), to.parent(), Some(run_dir)].into_iter().try_for_each(sync)
    };
    write().map_err(io(&to))
}

#[cfg(test)]
#[path = "courier_tests.rs"]
mod tests;
