//! Leaves of one matrix from several micro-batches of a wave, added together: the sums, the widest of what adding touches,
//! then pass through the processor once for all of them. Integer sums do not mind.

use super::{BadNumber, Leaves};
use crate::ops::buffer::Buffer;
use crate::ops::operation::operation;
use tch::{Kind, Tensor};

/// So many leaves are added at one time.
pub const TOGETHER: usize = 4;
/// No more bytes of leaves wait for others; a leaf that would be beyond is added alone.
const WAITING: usize = 64 << 20;

/// Holds matrices back until enough of them can be added together.
pub struct Held<'a> {
    leaves: &'a mut dyn Leaves,
    /// In the order in which their first leaf came.
    places: Vec<Place>,
    bytes: usize,
    /// Of the wave, whose leaves come now.
    micro_batch: usize,
    /// No other follows.
    last: bool,
    /// Whose leaf was refused.
    culprit: Option<usize>,
}

struct Place {
    bucket: usize,
    offset: usize,
    /// A head's leaf is narrow or wide, as many rows as it comes from.
    kind: Kind,
    /// With the micro-batch of each.
    waiting: Vec<(usize, Buffer)>,
}

impl<'a> Held<'a> {
    pub fn new(leaves: &'a mut dyn Leaves) -> Self {
        Held { leaves, places: Vec::new(), bytes: 0, micro_batch: 0, last: true, culprit: None }
    }

    /// The leaves of micro-batch `index` of the wave come, perhaps the last of it.
    pub fn begin(&mut self, index: usize, last: bool) {
        (self.micro_batch, self.last) = (index, last);
    }

    /// The micro-batch whose leaf was refused; `now` if none was.
    pub fn culprit(&self, now: usize) -> usize {
        self.culprit.unwrap_or(now)
    }

    /// Adds all that wait.
    pub fn finish(&mut self) -> Result<(), BadNumber> {
        (0..self.places.len()).try_for_each(|place| self.add(place))
    }

    fn add(&mut self, place: usize) -> Result<(), BadNumber> {
        let Place { bucket, offset, waiting, .. } = &mut self.places[place];
        if waiting.is_empty() {
            return Ok(());
        }
        let (from, buffers): (Vec<_>, Vec<_>) = std::mem::take(waiting).into_iter().unzip();
        self.bytes -= buffers.iter().map(bytes).sum::<usize>();
        let gradients: Vec<&Tensor> = buffers.iter().map(|buffer| &**buffer).collect();
        self.leaves.come_from(&from);
        operation("leaves", || self.leaves.together(*bucket, *offset, &gradients)).map_err(|(which, bad)| {
            self.culprit = Some(from[which]);
            bad
        })
    }
}

fn bytes(buffer: &Buffer) -> usize {
    buffer.numel() * buffer.kind().elt_size_in_bytes()
}

impl Leaves for Held<'_> {
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        self.leaves.come_from(&[self.micro_batch]);
        self.leaves.dense(bucket, offset, gradient)
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        self.leaves.come_from(&[self.micro_batch]);
        self.leaves.rows(bucket, offset, rows, gradient)
    }

    fn matrix(&mut self, bucket: usize, offset: usize, gradient: Buffer) -> Result<(), BadNumber> {
        let size = bytes(&gradient);
        let key = (bucket, offset, gradient.kind());
        let here = self.places.iter().position(|place| (place.bucket, place.offset, place.kind) == key);
        let alone = self.last && here.is_none_or(|place| self.places[place].waiting.is_empty());
        if alone || self.bytes + size > WAITING {
            self.leaves.come_from(&[self.micro_batch]);
            return operation("leaves", || self.leaves.dense(bucket, offset, &gradient));
        }
        let here = here.unwrap_or_else(|| {
            let waiting = Vec::with_capacity(TOGETHER);
            self.places.push(Place { bucket, offset, kind: gradient.kind(), waiting });
            self.places.len() - 1
        });
        self.bytes += size;
        self.places[here].waiting.push((self.micro_batch, gradient));
        match self.places[here].waiting.len() {
            TOGETHER => self.add(here),
            _ if self.last => self.add(here),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::buffer::Pool;
    use tch::Device;

    /// Which leaves came together, by their first element.
    #[derive(Default)]
    struct Seen(Vec<Vec<f64>>);

    impl Leaves for Seen {
        fn dense(&mut self, _: usize, _: usize, gradient: &Tensor) -> Result<(), BadNumber> {
            self.0.push(vec![gradient.double_value(&[0])]);
            Ok(())
        }
        fn rows(&mut self, _: usize, _: usize, _: &[u32], _: &Tensor) -> Result<(), BadNumber> {
            unreachable!("no rows here")
        }
        fn together(&mut self, bucket: usize, _: usize, gradients: &[&Tensor]) -> Result<(), (usize, BadNumber)> {
            self.0.push(gradients.iter().map(|g| g.double_value(&[0])).collect());
            match gradients.iter().position(|g| g.double_value(&[0]).is_nan()) {
                Some(which) => Err((which, BadNumber { bucket: bucket.to_string(), value: f64::NAN })),
                None => Ok(()),
            }
        }
    }

    fn leaf(pool: &Pool, value: f64, elements: usize) -> Buffer {
        let mut leaf = pool.take(Kind::Float, &[elements]);
        let _ = leaf.fill_(value);
        leaf
    }

    #[test]
    fn four_at_a_time_and_the_rest_at_the_end() {
        let (pool, mut seen) = (Pool::new(Device::Cpu), Seen::default());
        let mut held = Held::new(&mut seen);
        for micro_batch in 0..6 {
            held.begin(micro_batch, micro_batch == 5);
            held.matrix(0, 0, leaf(&pool, micro_batch as f64, 3)).expect("taken");
            held.matrix(0, 3, leaf(&pool, 10.0 + micro_batch as f64, 3)).expect("taken");
        }
        held.finish().expect("finite");
        assert_eq!(held.bytes, 0);
        assert_eq!(seen.0, [vec![0.0, 1.0, 2.0, 3.0], vec![10.0, 11.0, 12.0, 13.0], vec![4.0, 5.0], vec![14.0, 15.0]]);
    }

    #[test]
    fn the_last_one_waits_for_nobody() {
        let (pool, mut seen) = (Pool::new(Device::Cpu), Seen::default());
        let mut held = Held::new(&mut seen);
        held.begin(0, true);
        held.matrix(0, 0, leaf(&pool, 1.0, 3)).expect("taken");
        assert_eq!(held.bytes, 0);
        held.finish().expect("finite");
        assert_eq!(seen.0, [vec![1.0]]);
    }

    #[test]
    fn no_more_waits_than_there_is_room_for() {
        let (pool, mut seen) = (Pool::new(Device::Cpu), Seen::default());
        let mut held = Held::new(&mut seen);
        for value in [1.0, 2.0, 3.0] {
            held.begin(0, false);
            held.matrix(0, 0, leaf(&pool, value, WAITING / 8)).expect("taken");
        }
        held.finish().expect("finite");
        assert_eq!(seen.0, [vec![3.0], vec![1.0, 2.0]]);
    }

    #[test]
    fn a_refused_leaf_names_its_own_micro_batch() {
        let (pool, mut seen) = (Pool::new(Device::Cpu), Seen::default());
        let mut held = Held::new(&mut seen);
        for (micro_batch, value) in [(0, 1.0), (2, f64::NAN), (5, 2.0)] {
            held.begin(micro_batch, false);
            held.matrix(0, 0, leaf(&pool, value, 3)).expect("taken");
        }
        assert!(held.finish().is_err());
        assert_eq!((held.culprit(5), held.bytes), (2, 0));
    }
}
