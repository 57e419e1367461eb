//! The way of what lies on the host to the device that updates it, and back: while a piece is updated the next one comes and
//! the one before it goes, each on a stream of its own, in memory that the driver has locked. The host waits for none of it but
//! where somebody is about to look at what came home.
#![allow(unsafe_code)]

use super::away::PARTS;
use crate::collective::nccl::stream::{Address, Event, Gpu, Locked, Stream};
use crate::collective::nccl::Problem;
use std::ops::Range;
use tch::Tensor;

/// Where a piece comes to: of each part that lies on the host.
pub type Staging = [Option<Tensor>; PARTS];

pub struct Bus {
    gpu: Gpu,
    inward: Stream,
    outward: Stream,
    /// Bucket and elements of its own range, in the order in which an update asks for them.
    pieces: Vec<(usize, Range<usize>)>,
    staging: [Staging; 2],
    /// Of each bucket; empty parts are not locked, and never asked for.
    home: Vec<[Option<Locked>; PARTS]>,
    /// Of each staging: what was in it last has gone home.
    gone: [Option<Event>; 2],
    /// The staging that was used last.
    last: usize,
    /// What was asked for before its turn.
    ahead: Option<Coming>,
}

struct Coming {
    piece: usize,
    step: u64,
    staging: usize,
    come: Event,
}

/// A piece that the computing stream may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Come {
    piece: usize,
    pub staging: usize,
}

impl Bus {
    /// An error where the driver refuses anything that an update will ask of it.
    ///
    /// `home`: where pages begin, and the bytes of them that count, of [`super::pages::Pages`] that live where they are until
    /// this is dropped. From an update's first piece until [`Bus::wait`] nobody else touches them.
    pub fn new(
        gpu: Gpu,
        pieces: Vec<(usize, Range<usize>)>,
        staging: [Staging; 2],
        home: Vec<[Option<(*mut u8, usize)>; PARTS]>,
    ) -> Result<Self, Problem> {
        let lock = |pages: Option<(*mut u8, usize)>| {
            let pages = pages.filter(|(_, bytes)| *bytes > 0);
            // SAFETY: pages of their own, which live as long as this by the contract above.
            pages.map(|(at, bytes)| unsafe { Locked::new(gpu, at, bytes) }).transpose()
        };
        let mut locked = Vec::with_capacity(home.len());
        for [low, m, v] in home {
            locked.push([lock(low)?, lock(m)?, lock(v)?]);
        }
        let (inward, outward) = (Stream::new(gpu)?, Stream::new(gpu)?);
        let mut bus =
            Bus { gpu, inward, outward, pieces, staging, home: locked, gone: [None, None], last: 0, ahead: None };
        // The first piece comes and goes as it is: whatever the driver refuses, it refuses now.
        if !bus.pieces.is_empty() {
            let come = bus.come_piece(0, 0)?;
            bus.leave(come)?;
            bus.wait()?;
            bus.ahead = None;
        }
        Ok(bus)
    }

    /// Brings a piece of update number `step` to where the computing stream, from now on, may use it, and the next one behind it.
    pub fn come(&mut self, bucket: usize, piece: &Range<usize>, step: u64) -> Result<Come, Problem> {
        let found = self.pieces.binary_search_by_key(&(bucket, piece.start), |(bucket, piece)| (*bucket, piece.start));
        let found = found.expect("updates come in the pieces that were told");
        assert_eq!(self.pieces[found].1.end, piece.end, "the whole piece");
        self.come_piece(found, step)
    }

    fn come_piece(&mut self, piece: usize, step: u64) -> Result<Come, Problem> {
        let coming = match self.ahead.take().filter(|ahead| (ahead.piece, ahead.step) == (piece, step)) {
            Some(ahead) => ahead,
            None => {
                // What the staging held for others, and what the last update wrote to the same bytes of the host.
                self.inward.follow(&self.gpu.mark_computing()?)?;
                if let Some(gone) = &self.gone[self.last] {
                    self.inward.follow(gone)?;
                }
                self.fetch(piece, step)?
            }
        };
        self.gpu.computing_follows(&coming.come)?;
        if piece + 1 < self.pieces.len() {
            self.ahead = Some(self.fetch(piece + 1, step)?);
        }
        Ok(Come { piece, staging: coming.staging })
    }

    /// Asks for a piece, into the staging that was used longer ago.
    fn fetch(&mut self, piece: usize, step: u64) -> Result<Coming, Problem> {
        self.last = 1 - self.last;
        let staging = self.last;
        if let Some(gone) = &self.gone[staging] {
            self.inward.follow(gone)?;
        }
        for (to, home, bytes) in self.parts(piece, staging) {
            // SAFETY: `to` is a staging of at least as many bytes, which lives as long as this and was left before, see above;
            // nobody touches the pages, by the contract of `new`.
            unsafe { self.inward.bring(to, home, bytes) }?;
        }
        Ok(Coming { piece, step, staging, come: self.inward.mark()? })
    }

    /// Sends a piece home, as the computing stream leaves it.
    pub fn leave(&mut self, Come { piece, staging }: Come) -> Result<(), Problem> {
        self.outward.follow(&self.gpu.mark_computing()?)?;
        for (from, home, bytes) in self.parts(piece, staging) {
            // SAFETY: as in `fetch`; what comes to this staging next waits for this.
            unsafe { self.outward.take(home, bytes, from) }?;
        }
        self.gone[staging] = Some(self.outward.mark()?);
        Ok(())
    }

    /// Waits until the host's pages are whole: as far as they ever left, they are home.
    pub fn wait(&self) -> Result<(), Problem> {
        // The stream goes home in order, but which of the two was the last is not kept.
        self.gone.iter().flatten().try_for_each(Event::wait)
    }

    /// Of each part that lies on the host: its place in a staging, and the piece's bytes of its pages.
    fn parts(&self, piece: usize, staging: usize) -> impl Iterator<Item = (Address, &Locked, Range<usize>)> {
        let (bucket, piece) = &self.pieces[piece];
        self.staging[staging].iter().zip(&self.home[*bucket]).filter_map(|(staged, home)| {
            let (staged, home) = (staged.as_ref()?, home.as_ref()?);
            let width = staged.kind().elt_size_in_bytes();
            assert!(piece.len() <= staged.numel(), "a staging holds the longest piece");
            Some((Address(staged.data_ptr() as u64), home, piece.start * width..piece.end * width))
        })
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        for stream in [&self.inward, &self.outward] {
            // What cannot be waited for is a device that does nothing any more.
            let _ = stream.mark().and_then(|event| event.wait());
        }
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pieces", self.pieces.len())
    }
}
