//! Pages of the ledger as viewers are sent them: entries are encoded once, and pages shared.

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use std::collections::VecDeque;
use unisono_proto::v1::Event;

/// Newest entries that are kept in memory, and their bytes: a viewer that keeps up costs the ledger nothing.
const RECENT: usize = 1024;
const RECENT_BYTES: usize = 1 << 20;

/// Of a page, unless its first entry is larger. One that takes nothing holds two of them.
const PAGE_BYTES: usize = 8 << 10;

/// Entries as they are sent: messages of gRPC, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub bytes: Bytes,
    /// Sequence number of its last entry.
    pub last: u64,
}

impl Page {
    /// As many of `events` as a page holds; `None` of none.
    pub fn of(events: &[Event]) -> Option<Self> {
        Self::pack(events.iter().map(|event| (event.sequence, encoded(event))))
    }

    /// As many of `entries` as a page holds, each with its sequence number.
    fn pack(entries: impl Iterator<Item = (u64, Bytes)>) -> Option<Self> {
        let (mut bytes, mut last) = (BytesMut::new(), None);
        for (sequence, entry) in entries {
            if last.is_some() && bytes.len() + entry.len() > PAGE_BYTES {
                break;
            }
            bytes.extend_from_slice(&entry);
            last = Some(sequence);
        }
        Some(Page { bytes: bytes.freeze(), last: last? })
    }
}

/// One message of gRPC: not compressed, its length, itself.
fn encoded(event: &Event) -> Bytes {
    let length = event.encoded_len();
    let mut bytes = BytesMut::with_capacity(5 + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).expect("an entry is far below 4 GiB"));
    event.encode(&mut bytes).expect("room was made");
    bytes.freeze()
}

/// The newest entries, in order and without gaps.
#[derive(Debug, Default)]
pub struct Recent {
    entries: VecDeque<Bytes>,
    /// Sequence number of the first of them.
    first: u64,
    bytes: usize,
    /// The page made last, and what it comes after: viewers who are told together get the same.
    made: Option<(u64, Page)>,
}

impl Recent {
    pub fn extend(&mut self, events: &[Event]) {
        let Some(first) = events.first() else { return };
        if self.entries.is_empty() {
            self.first = first.sequence;
        }
        for event in events {
            let entry = encoded(event);
            self.bytes += entry.len();
            self.entries.push_back(entry);
        }
        while self.entries.len() > RECENT || self.bytes > RECENT_BYTES && self.entries.len() > 1 {
            let gone = self.entries.pop_front().expect("there are some");
            (self.first, self.bytes) = (self.first + 1, self.bytes - gone.len());
        }
    }

    /// The page after `sequence`; `None` where its first entry is not here.
    pub fn after(&mut self, sequence: u64) -> Option<Page> {
        let skipped = usize::try_from((sequence + 1).checked_sub(self.first)?).ok()?;
        self.entries.get(skipped)?;
        let newest = self.first + self.entries.len() as u64 - 1;
        // A page that ended because no more was there may have grown.
        let whole = |page: &Page| page.last == newest || page.bytes.len() + self.size(page.last + 1) > PAGE_BYTES;
        if let Some((_, page)) = self.made.as_ref().filter(|(after, page)| *after == sequence && whole(page)) {
            return Some(page.clone());
        }
        let page = Page::pack((sequence + 1..).zip(self.entries.range(skipped..).cloned()))?;
        self.made = Some((sequence, page.clone()));
        Some(page)
    }

    fn size(&self, sequence: u64) -> usize {
        let place = sequence.checked_sub(self.first).and_then(|place| usize::try_from(place).ok());
        place.and_then(|place| self.entries.get(place)).map_or(0, Bytes::len)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use unisono_proto::v1::{event::Body, StepCommitted};

    pub fn entries(sequences: std::ops::RangeInclusive<u64>) -> Vec<Event> {
        let event = |sequence| {
            let step = StepCommitted { step: sequence, loss: 1.5, seconds: 0.1, ..Default::default() };
            Event { sequence, time: 1.0, body: Some(Body::Step(step)) }
        };
        sequences.map(event).collect()
    }

    /// The sequence numbers of its entries.
    pub fn read(mut page: Page) -> Vec<u64> {
        let mut sequences = Vec::new();
        while !page.bytes.is_empty() {
            assert_eq!(page.bytes[0], 0, "not compressed");
            let length = u32::from_be_bytes(page.bytes[1..5].try_into().unwrap()) as usize;
            let message = page.bytes.split_to(5 + length).split_off(5);
            sequences.push(Event::decode(message).unwrap().sequence);
        }
        assert_eq!(sequences.last(), Some(&page.last));
        sequences
    }

    #[test]
    fn the_newest_entries_are_in_memory_and_older_ones_are_not() {
        let mut recent = Recent::default();
        assert_eq!(recent.after(0), None);
        recent.extend(&entries(1..=1000));
        recent.extend(&entries(1001..=1030));
        assert_eq!(recent.after(5), None, "1 to 6 are gone");
        let page = recent.after(6).unwrap();
        assert!(page.bytes.len() <= PAGE_BYTES && page.last > 100, "{} bytes", page.bytes.len());
        assert_eq!(read(page.clone()), (7..=page.last).collect::<Vec<_>>());
        assert_eq!(Page::of(&entries(7..=1030)), Some(page), "from the ledger it is the same one");
        assert_eq!(read(recent.after(1028).unwrap()), [1029, 1030]);
        assert_eq!(recent.after(1030), None);
        recent.extend(&entries(1031..=1031));
        assert_eq!(read(recent.after(1028).unwrap()), [1029, 1030, 1031], "the page has grown");
    }

    #[test]
    fn memory_is_bounded_in_bytes_and_a_large_entry_is_a_page() {
        let mut recent = Recent::default();
        let large = |sequence| {
            let mut event = entries(sequence..=sequence);
            if let Some(Body::Step(step)) = &mut event[0].body {
                step.rank_tokens = vec![1 << 60; 30_000];
            }
            event
        };
        (1..=9).for_each(|sequence| recent.extend(&large(sequence)));
        assert!(recent.bytes <= RECENT_BYTES && recent.after(0).is_none());
        let page = recent.after(6).unwrap();
        assert!(page.bytes.len() > PAGE_BYTES);
        assert_eq!(read(page), [7]);
        assert_eq!(read(Page::of(&large(3)).unwrap()), [3]);
        assert_eq!(Page::of(&[]), None);
    }
}
