//! Tokens on disk, found by the text that they come from: each text is tokenized once, whichever run asks for it.
//!
//! A cache directory belongs to one tokenizer and one `train.max_length` (its name is a hash of both) and holds segments.
//! Each run that tokenizes something writes a segment of its own, so that two runs never write the same file. A segment
//! is two files that only grow: `*.tokens`, entries one after another, and `*.index`, one record of fixed length for each
//! entry, written after it. Records and entries carry checksums: what a crash left half-written is not found, or is found
//! to be damaged and tokenized again. Nothing waits for the disk.
//!
//! ```text
//! record  key 16 | offset 8 | bytes 4 | tokens 4 | targets 4 | unasked 4 | flags 4 | checksum of the entry 8 | of the record 8
//! entry   prompt | number of gaps | (begin, end) of each | tokens            all u32, tokens u16 where every id fits
//! ```
//!
//! All integers are little-endian.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

/// Opens every index; a change of the layout changes it.
const MAGIC: &[u8; 16] = b"unisono tokens 1";
const RECORD: usize = 64;
/// The completion was cut at its right end.
const TRUNCATED: u32 = 1;
/// The gate's bits begin here.
const FLAWS: u32 = 8;
/// Token ids are u16.
const NARROW: u32 = 2;

/// What is known of a row without reading its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    pub tokens: u32,
    pub targets: u32,
    /// Tokens that the model is not asked for.
    pub unasked: u32,
    pub truncated: bool,
    /// What the gate says of its tokens, as bits.
    pub flaws: u8,
}

/// Where an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub segment: u16,
    pub offset: u64,
    pub bytes: u32,
    checksum: u64,
}

/// A row's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub tokens: Box<[u32]>,
    pub prompt: u32,
    pub gaps: Box<[Range<u32>]>,
}

/// The segments of one cache directory, and the one that this run writes.
pub struct Cache {
    directory: PathBuf,
    /// Files of tokens that were found, in the order of their names.
    found: Vec<PathBuf>,
    state: Mutex<State>,
}

struct State {
    /// Files of tokens by number of the segment; opened when they are first read.
    open: Vec<Option<File>>,
    writer: Option<Writer>,
    /// A write failed: nothing more is kept.
    broken: bool,
    written: u64,
}

struct Writer {
    segment: u16,
    tokens: File,
    index: File,
    end: u64,
}

impl Cache {
    /// The cache directory below `root` for texts that `identity` tokenizes. Makes it where it is missing.
    pub fn open(root: &Path, identity: &[u8]) -> io::Result<Self> {
        let name = blake3::Hasher::new_derive_key("unisono 1 token cache").update(identity).finalize().to_hex();
        let directory = root.join(&name[..32]);
        fs::create_dir_all(&directory)?;
        let mut found: Vec<PathBuf> = fs::read_dir(&directory)?.flatten().map(|entry| entry.path()).collect();
        found.retain(|path| path.extension().is_some_and(|e| e == "tokens"));
        found.sort();
        found.truncate(usize::from(u16::MAX) - 1);
        let open = found.iter().map(|_| None).collect();
        let state = Mutex::new(State { open, writer: None, broken: false, written: 0 });
        Ok(Cache { directory, found, state })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes that this run has added.
    pub fn written(&self) -> u64 {
        self.lock().written
    }

    /// Tells `tell` of every entry that is there. A segment that `tell` wanted something of counts as used now.
    pub fn scan(&self, mut tell: impl FnMut(u128, Measure, Place) -> bool) {
        for (segment, path) in (0..).zip(&self.found) {
            // Another run may have removed it.
            let Ok(mut bytes) = fs::read(path.with_extension("index")) else { continue };
            let end = path.metadata().map_or(0, |m| m.len());
            if !bytes.starts_with(MAGIC) {
                continue;
            }
            let mut wanted = false;
            for record in bytes.split_off(MAGIC.len()).as_chunks::<RECORD>().0 {
                if let Some((key, measure, place)) = parse(record, segment).filter(|(_, _, p)| p.fits(end)) {
                    wanted |= tell(key, measure, place);
                }
            }
            if wanted {
                // Fails where the file is another user's; then its age counts.
                File::options().append(true).open(path).and_then(|f| f.set_modified(SystemTime::now())).ok();
            }
        }
    }

    /// The entry at `place`; `None` where it is damaged or gone.
    pub fn read(&self, place: Place, measure: Measure) -> Option<Entry> {
        let mut bytes = vec![0; place.bytes as usize];
        {
            let mut state = self.lock();
            let slot = state.open.get_mut(usize::from(place.segment))?;
            if slot.is_none() {
                *slot = Some(File::open(self.found.get(usize::from(place.segment))?).ok()?);
            }
            slot.as_ref()?.read_exact_at(&mut bytes, place.offset).ok()?;
        }
        (checksum(&bytes) == place.checksum).then(|| unpack(&bytes, measure))?
    }

    /// Adds entries and returns where they are; nowhere, where they could not be written. The first failure is the last:
    /// it is returned once, and from then on nothing is kept.
    pub fn append<'e>(&self, entries: impl Iterator<Item = (u128, Measure, &'e Entry)>) -> io::Result<Vec<Place>> {
        let mut state = self.lock();
        if state.broken {
            return Ok(Vec::new());
        }
        let result = self.write(&mut state, entries);
        if result.is_err() {
            state.broken = true;
        }
        result
    }

    fn write<'e>(
        &self,
        state: &mut State,
        entries: impl Iterator<Item = (u128, Measure, &'e Entry)>,
    ) -> io::Result<Vec<Place>> {
        if state.writer.is_none() {
            let (tokens, index) = self.create()?;
            let segment = state.open.len() as u16;
            state.open.push(Some(tokens.try_clone()?));
            state.writer = Some(Writer { segment, tokens, index, end: 0 });
        }
        let Some(writer) = state.writer.as_mut() else { return Ok(Vec::new()) };
        let (mut tokens, mut index, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (key, measure, entry) in entries {
            let begin = tokens.len();
            let cut = if measure.truncated { TRUNCATED } else { 0 };
            let flags = pack(entry, &mut tokens) | cut | u32::from(measure.flaws) << FLAWS;
            let place = Place {
                segment: writer.segment,
                offset: writer.end + begin as u64,
                bytes: (tokens.len() - begin) as u32,
                checksum: checksum(&tokens[begin..]),
            };
            index.extend_from_slice(&record(key, measure, place, flags));
            places.push(place);
        }
        writer.tokens.write_all(&tokens)?;
        writer.end += tokens.len() as u64;
        writer.index.write_all(&index)?;
        state.written += (tokens.len() + index.len()) as u64;
        Ok(places)
    }

    /// A new segment, whose name nobody else has.
    fn create(&self) -> io::Result<(File, File)> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        for attempt in 0..100 {
            let path = self.directory.join(format!("{now:032x}-{}-{attempt}.tokens", std::process::id()));
            let made = OpenOptions::new().read(true).append(true).create_new(true).open(&path);
            let tokens = match made {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            };
            // Held as long as it is written: nobody makes room by removing it.
            tokens.lock()?;
            let mut index = OpenOptions::new().append(true).create_new(true).open(path.with_extension("index"))?;
            index.write_all(MAGIC)?;
            return Ok((tokens, index));
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What the caches below a root hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Holding {
    pub bytes: u64,
    pub removed: u64,
}

/// Removes the segments that were not used for longest until those below `root` take at most `limit` bytes. Segments
/// that a run is writing stay.
pub fn make_room(root: &Path, limit: u64) -> Holding {
    let mut segments: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    let entries = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in entries(root).flat_map(|directory| entries(&directory).collect::<Vec<_>>()) {
        if path.extension().is_some_and(|e| e == "tokens") {
            let size = |path: &Path| path.metadata().map_or(0, |m| m.len());
            let used = path.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            segments.push((used, size(&path) + size(&path.with_extension("index")), path));
        }
    }
    segments.sort();
    let mut holding = Holding { bytes: segments.iter().map(|(_, bytes, _)| bytes).sum(), removed: 0 };
    for (_, bytes, path) in segments {
        if holding.bytes <= limit {
            break;
        }
        let free = File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
        // The index first: without it nothing of the segment is found.
        if free && fs::remove_file(path.with_extension("index")).is_ok() && fs::remove_file(&path).is_ok() {
            holding.bytes -= bytes;
            holding.removed += bytes;
        }
    }
    holding
}

impl Place {
    fn fits(&self, end: u64) -> bool {
        self.offset.checked_add(u64::from(self.bytes)).is_some_and(|last| last <= end)
    }
}

fn checksum(bytes: &[u8]) -> u64 {
    let hash = blake3::hash(bytes);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

fn record(key: u128, measure: Measure, place: Place, flags: u32) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let mut rest = &mut record[..RECORD - 8];
    let mut put = |bytes: &[u8]| rest.write_all(bytes).expect("a record has room for its fields");
    put(&key.to_le_bytes());
    put(&place.offset.to_le_bytes());
    for field in [place.bytes, measure.tokens, measure.targets, measure.unasked, flags] {
        put(&field.to_le_bytes());
    }
    put(&[0; 4]);
    put(&place.checksum.to_le_bytes());
    let sum = checksum(&record[..RECORD - 8]);
    record[RECORD - 8..].copy_from_slice(&sum.to_le_bytes());
    record
}

fn parse(record: &[u8; RECORD], segment: u16) -> Option<(u128, Measure, Place)> {
    let u32_at = |at: usize| record[at..].first_chunk().copied().map_or(0, u32::from_le_bytes);
    let u64_at = |at: usize| record[at..].first_chunk().copied().map_or(0, u64::from_le_bytes);
    if u64_at(RECORD - 8) != checksum(&record[..RECORD - 8]) {
        return None;
    }
    let key = record.first_chunk().copied().map(u128::from_le_bytes)?;
    let [bytes, tokens, targets, unasked, flags] = [24, 28, 32, 36, 40].map(u32_at);
    let (truncated, flaws) = (flags & TRUNCATED != 0, (flags >> FLAWS) as u8);
    let measure = Measure { tokens, targets, unasked, truncated, flaws };
    Some((key, measure, Place { segment, offset: u64_at(16), bytes, checksum: u64_at(48) }))
}

/// Appends the entry to `out`; returns [`NARROW`] where ids took two bytes.
fn pack(entry: &Entry, out: &mut Vec<u8>) -> u32 {
    let mut put = |value: u32| out.extend_from_slice(&value.to_le_bytes());
    put(entry.prompt);
    put(entry.gaps.len() as u32);
    for gap in &entry.gaps {
        put(gap.start);
        put(gap.end);
    }
    match entry.tokens.iter().all(|&id| id <= u32::from(u16::MAX)) {
        true => {
            entry.tokens.iter().for_each(|&id| out.extend_from_slice(&(id as u16).to_le_bytes()));
            NARROW
        }
        false => {
            entry.tokens.iter().for_each(|&id| out.extend_from_slice(&id.to_le_bytes()));
            0
        }
    }
}

fn unpack(bytes: &[u8], measure: Measure) -> Option<Entry> {
    let mut rest = bytes;
    let mut take = || {
        let mut four = [0; 4];
        rest.read_exact(&mut four).ok()?;
        Some(u32::from_le_bytes(four))
    };
    let prompt = take()?;
    let count = take()? as usize;
    if count > bytes.len() / 8 {
        return None;
    }
    let gaps = (0..count).map(|_| Some(take()?..take()?)).collect::<Option<_>>()?;
    let expected = measure.tokens as usize;
    let tokens: Box<[u32]> = match rest.len() {
        n if n == expected * 2 => rest.as_chunks().0.iter().map(|id| u32::from(u16::from_le_bytes(*id))).collect(),
        n if n == expected * 4 => rest.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect(),
        _ => return None,
    };
    Some(Entry { tokens, prompt, gaps })
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
