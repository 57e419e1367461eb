//! The ledger: the durable record of a run, in `ledger.sqlite`, which users may query while the run goes on.
//!
//! `events` has one row an entry, in order: `body` is its JSON, `message` the same as the wire carries it, to the bit.
//! The views `steps` and `evals` spread the two kinds that are looked at most. One connection writes; readers have their
//! own and never block it (WAL).

use super::filesystem;
use prost::Message;
use rusqlite::{params, Connection, ErrorCode, OpenFlags, OptionalExtension};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};
use unisono_proto::v1::{event::Body, Event};

/// Name of the file within a run's directory.
pub const LEDGER: &str = "ledger.sqlite";

/// Version of the tables.
const VERSION: i64 = 1;

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    sequence INTEGER PRIMARY KEY,
    time REAL NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    message BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, uses INTEGER NOT NULL) WITHOUT ROWID;
CREATE VIEW IF NOT EXISTS steps AS SELECT
    json_extract(body, '$.step') AS step, json_extract(body, '$.loss') AS loss,
    json_extract(body, '$.grad_norm') AS grad_norm, json_extract(body, '$.lr') AS lr,
    json_extract(body, '$.examples') AS examples, json_extract(body, '$.tokens') AS tokens,
    json_extract(body, '$.target_tokens') AS target_tokens, json_extract(body, '$.seconds') AS seconds,
    json_extract(body, '$.generation') AS generation, time
    FROM events WHERE kind = 'step';
CREATE VIEW IF NOT EXISTS evals AS SELECT
    json_extract(body, '$.step') AS step, json_extract(body, '$.split') AS split,
    json_extract(body, '$.task') AS task, json_extract(body, '$.loss') AS loss,
    json_extract(body, '$.perplexity') AS perplexity, json_extract(body, '$.token_accuracy') AS token_accuracy,
    json_extract(body, '$.targets') AS targets, time
    FROM events WHERE kind = 'eval';
";

/// Why the ledger cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}: another coordinator (or its supervisor) runs in this directory; end it first, or choose another --run-dir")]
    Locked { path: PathBuf },
    #[error("{path}: cannot be opened ({source}); check the run directory's permissions")]
    Lock { path: PathBuf, source: std::io::Error },
    #[error("{path}: lies on a network file system ({kind}), where the ledger's locks do not hold; choose a --run-dir on a local disk")]
    Network { path: PathBuf, kind: String },
    #[error(
        "{path}: written by another version (tables {found}, this build has {VERSION}); use the build that wrote it"
    )]
    Version { path: PathBuf, found: i64 },
    #[error("{path}: {source}; check the space left on the disk and the file's permissions")]
    Sqlite { path: PathBuf, source: rusqlite::Error },
    #[error("{path}: entry {sequence} is damaged; restore the file from a copy")]
    Damaged { path: PathBuf, sequence: u64 },
}

impl Error {
    /// A full disk may have room again, and whoever holds the file will let it go.
    pub fn may_pass(&self) -> bool {
        let Error::Sqlite { source, .. } = self else { return false };
        let code = source.sqlite_error_code();
        matches!(code, Some(ErrorCode::DiskFull | ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
    }
}

/// The one writer. Holds the run's lock as long as it lives.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    connection: Connection,
    term: u64,
    sequence: u64,
    _lock: File,
}

impl Ledger {
    /// Locks the run and opens its ledger, which begins a new term. The new term is durable when this returns.
    pub fn open(run_dir: &Path) -> Result<Self, Error> {
        if let Some(kind) = filesystem::network(run_dir) {
            return Err(Error::Network { path: run_dir.into(), kind });
        }
        let lock = lock(run_dir)?;
        let path = run_dir.join(LEDGER);
        let fail = |source| Error::Sqlite { path: path.clone(), source };
        let mut connection = Connection::open(&path).map_err(fail)?;
        // FULL: the log is on the disk before a commit returns, so that no entry that had effects is ever lost.
        connection.pragma_update(None, "journal_mode", "WAL").map_err(fail)?;
        connection.pragma_update(None, "synchronous", "FULL").map_err(fail)?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(fail)?;
        if found != 0 && found != VERSION {
            return Err(Error::Version { path, found });
        }
        let begin = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            transaction.execute_batch(SCHEMA)?;
            transaction.pragma_update(None, "user_version", VERSION)?;
            let term =
                "INSERT INTO meta VALUES ('term', 1) ON CONFLICT (key) DO UPDATE SET value = value + 1 RETURNING value";
            let term: u64 = transaction.query_row(term, [], |row| row.get(0))?;
            let last: Option<u64> = transaction.query_row("SELECT max(sequence) FROM events", [], |row| row.get(0))?;
            transaction.commit()?;
            Ok((term, last.unwrap_or(0)))
        };
        let (term, sequence) = begin(&mut connection).map_err(fail)?;
        Ok(Ledger { path, connection, term, sequence, _lock: lock })
    }

    /// Which start of the coordinator this is, from 1.
    pub fn term(&self) -> u64 {
        self.term
    }

    /// Number of the newest entry; 0: there is none.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Appends `bodies` in one transaction and returns them as entries. All are durable when this returns, or none is.
    pub fn append(&mut self, time: f64, bodies: Vec<Body>) -> Result<Vec<Event>, Error> {
        let events = self.number(time, bodies);
        self.write(&events)?;
        Ok(events)
    }

    /// The next entries, which are not written yet.
    pub fn number(&self, time: f64, bodies: Vec<Body>) -> Vec<Event> {
        let number = |(sequence, body)| Event { sequence, time, body: Some(body) };
        (self.sequence + 1..).zip(bodies).map(number).collect()
    }

    /// Writes the next entries in one transaction. All are durable when this returns, or none is, and it may be tried again.
    pub fn write(&mut self, events: &[Event]) -> Result<(), Error> {
        let write = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            let mut insert = transaction.prepare_cached("INSERT INTO events VALUES (?1, ?2, ?3, ?4, ?5)")?;
            for event in events {
                let body = event.body.as_ref().expect("set above");
                let json = serde_json::Value::Object(body.to_json()).to_string();
                insert.execute(params![event.sequence, event.time, body.kind(), json, event.encode_to_vec()])?;
            }
            drop(insert);
            transaction.commit()
        };
        write(&mut self.connection).map_err(|source| Error::Sqlite { path: self.path.clone(), source })?;
        self.sequence += events.len() as u64;
        Ok(())
    }

    /// Counts one more use of the token `id`; false where it has had `most` already. Durable when this returns: should the answer
    /// be lost on its way, whoever comes again without it is another use.
    pub fn spend(&mut self, id: u64, most: u32) -> Result<bool, Error> {
        let sql = "INSERT INTO tokens VALUES (?1, 1) ON CONFLICT (id) DO UPDATE SET uses = uses + 1 WHERE uses < ?2";
        let spent = self.connection.execute(sql, params![format!("{id:016x}"), most]);
        spent.map(|rows| rows == 1).map_err(|source| Error::Sqlite { path: self.path.clone(), source })
    }

    /// A reader of the same ledger.
    pub fn reader(&self) -> Result<Reader, Error> {
        Reader::open(&self.path)
    }
}

/// Reads a ledger without ever holding its writer up.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    connection: Connection,
}

impl Reader {
    /// Opens the ledger file at `path`.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let open = Connection::open_with_flags(path, flags);
        let connection = open.map_err(|source| Error::Sqlite { path: path.into(), source })?;
        Ok(Reader { path: path.into(), connection })
    }

    /// Writes the ledger as it is now into a new file.
    pub fn copy_to(&self, path: &Path) -> Result<(), Error> {
        let copied = self.connection.execute("VACUUM INTO ?1", [path.to_string_lossy()]);
        copied.map(drop).map_err(|source| Error::Sqlite { path: path.into(), source })
    }

    /// At most `limit` entries after `sequence`, in order.
    pub fn after(&self, sequence: u64, limit: usize) -> Result<Vec<Event>, Error> {
        let read = || {
            let sql = "SELECT sequence, message FROM events WHERE sequence > ?1 ORDER BY sequence LIMIT ?2";
            let mut statement = self.connection.prepare_cached(sql)?;
            let rows = statement.query_map(params![sequence, limit], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect::<Result<Vec<(u64, Vec<u8>)>, _>>()
        };
        let rows = read().map_err(|source| Error::Sqlite { path: self.path.clone(), source })?;
        let decode = |(sequence, message): (u64, Vec<u8>)| {
            Event::decode(message.as_slice()).map_err(|_| Error::Damaged { path: self.path.clone(), sequence })
        };
        rows.into_iter().map(decode).collect()
    }

    /// The newest entry of `kind`.
    pub fn last(&self, kind: &str) -> Result<Option<Event>, Error> {
        let sql = "SELECT sequence, message FROM events WHERE kind = ?1 ORDER BY sequence DESC LIMIT 1";
        let row: Option<(u64, Vec<u8>)> = self
            .connection
            .query_row(sql, [kind], |row| Ok((row.get(0)?, row.get(1)?)))
            .optional()
            .map_err(|source| Error::Sqlite { path: self.path.clone(), source })?;
        let decode = |(sequence, message): (u64, Vec<u8>)| {
            Event::decode(message.as_slice()).map_err(|_| Error::Damaged { path: self.path.clone(), sequence })
        };
        row.map(decode).transpose()
    }
}

/// One coordinator a run directory: the kernel gives the lock back however its holder ends.
fn lock(run_dir: &Path) -> Result<File, Error> {
    let path = run_dir.join("lock");
    let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = opened.map_err(|source| Error::Lock { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Locked { path: run_dir.into() }),
        Err(TryLockError::Error(source)) => Err(Error::Lock { path, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unisono_proto::v1::{Evaluated, StepCommitted};

    fn step(step: u64, loss: f64) -> Body {
        Body::Step(StepCommitted { step, loss, grad_norm: 0.1 + 0.2, ..Default::default() })
    }

    #[test]
    fn entries_are_numbered_without_gaps_and_read_back_to_the_bit() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        let reader = ledger.reader().unwrap();
        let first = ledger.append(1.5, vec![step(1, 2.0 / 3.0), step(2, f64::MIN_POSITIVE)]).unwrap();
        let eval = Body::Eval(Evaluated {
            step: 2,
            split: "validation".into(),
            perplexity: f64::INFINITY,
            ..Default::default()
        });
        let second = ledger.append(2.5, vec![eval]).unwrap();
        let all: Vec<Event> = first.into_iter().chain(second).collect();
        assert_eq!(all.iter().map(|e| e.sequence).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(reader.after(0, 10).unwrap(), all);
        assert_eq!(reader.after(1, 1).unwrap(), all[1..2]);
        assert_eq!(reader.last("step").unwrap().unwrap(), all[1]);
        assert_eq!(reader.last("done").unwrap(), None);
        let loss: f64 = reader.connection.query_row("SELECT loss FROM steps WHERE step = 1", [], |r| r.get(0)).unwrap();
        assert_eq!(loss, 2.0 / 3.0);
        let split: String = reader.connection.query_row("SELECT split FROM evals", [], |r| r.get(0)).unwrap();
        assert_eq!(split, "validation");
    }

    #[test]
    fn a_token_is_used_up_for_good() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert!(
            ledger.spend(u64::MAX, 2).unwrap() && ledger.spend(7, 1).unwrap() && ledger.spend(u64::MAX, 2).unwrap()
        );
        drop(ledger);
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert!(!ledger.spend(u64::MAX, 2).unwrap() && !ledger.spend(7, 1).unwrap());
        assert!(ledger.spend(8, 1).unwrap());
    }

    #[test]
    fn terms_grow_and_only_one_holds_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.term(), 1);
        ledger.append(0.0, vec![step(1, 0.0)]).unwrap();
        let refused = Ledger::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("another coordinator"), "{refused}");
        drop(ledger);
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert_eq!(ledger.term(), 2);
        assert_eq!(ledger.append(0.0, vec![step(2, 0.0)]).unwrap()[0].sequence, 2);
    }
}
