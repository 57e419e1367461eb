//! Carries exchanges out behind computing, on a thread of its own, one after another in the order in which they were
//! handed over. Every rank hands over the same ones in the same order, so no exchange can wait for one behind it.

use super::nccl::stream::Gpu;
use super::nccl::Problem;
use super::pulse::Pulse;
use super::tcp::Stopper;
use super::{Collective, Error};
use crate::progress::Progress;
use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::mpsc::{channel, Receiver, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use unisono_proto::fail_point;

/// Says whether the next one may be carried out.
type Job = Box<dyn FnOnce(&mut dyn Collective) -> bool + Send>;

/// What an exchange brings when it is done.
#[must_use]
#[derive(Debug)]
pub struct Ticket<T> {
    result: Receiver<T>,
    failure: Failure,
    progress: Arc<Progress>,
}

impl<T> Ticket<T> {
    /// Waits for the exchange. The first failure is told once, to whoever waits next; nothing after it is carried out.
    pub fn wait(self) -> Result<T, Error> {
        let come = match self.result.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Empty) => self.progress.exchanging(|| self.result.recv()),
            Err(TryRecvError::Disconnected) => self.result.recv(),
        };
        come.map_err(|_| self.failure.take().unwrap_or(Error::Stopped))
    }
}

#[derive(Debug, Clone, Default)]
struct Failure(Arc<Mutex<Option<Error>>>);

impl Failure {
    fn set(&self, error: Error) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
    }

    fn take(&self) -> Option<Error> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Who carries exchanges out.
enum Hands {
    /// A world of one has nothing to wait for: at once, by whoever hands over.
    Own(Box<dyn Collective + Send>),
    Thread(Option<Sender<Job>>, Option<JoinHandle<()>>),
}

pub struct Courier {
    rank: usize,
    world: usize,
    hands: Hands,
    failure: Failure,
    stopper: Stopper,
    /// Where waiting for exchanges is told from computing.
    progress: Arc<Progress>,
    /// Where what is handed over may still be computed.
    gpu: Option<Gpu>,
}

impl Courier {
    /// `stopper` ends what `collective` does when the courier is given up.
    pub fn new(collective: Box<dyn Collective + Send>, stopper: &Stopper) -> Self {
        Self::over(collective, stopper, Arc::default())
    }

    /// The same for a worker whose `progress` is told to somebody who judges when peers were silent for too long.
    pub fn heard(mut collective: Box<dyn Collective + Send>, stopper: &Stopper, progress: &Arc<Progress>) -> Self {
        collective.heard_by(progress.pulse());
        Self::over(collective, stopper, progress.clone())
    }

    fn over(collective: Box<dyn Collective + Send>, stopper: &Stopper, progress: Arc<Progress>) -> Self {
        let (rank, world, gpu) = (collective.rank(), collective.world(), collective.gpu());
        let failure = Failure::default();
        let hands = match world {
            1 => Hands::Own(collective),
            _ => {
                let (jobs, queue) = channel();
                let pulse = progress.pulse().clone();
                let carry = move || carry(collective, &queue, &pulse);
                let thread = std::thread::Builder::new().name("courier".into()).spawn(carry);
                Hands::Thread(Some(jobs), Some(thread.expect("a machine that runs a worker has a thread for it")))
            }
        };
        Courier { rank, world, hands, failure, stopper: stopper.clone(), progress, gpu }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn world(&self) -> usize {
        self.world
    }

    /// An error where computing on would be in vain: an exchange has failed, or all were stopped.
    pub fn check(&self) -> Result<(), Error> {
        match self.failure.take() {
            Some(error) => Err(error),
            None if self.stopper.stopped() => Err(Error::Stopped),
            None => Ok(()),
        }
    }

    /// Hands an exchange over.
    pub fn send<T: Send + 'static>(
        &mut self,
        exchange: impl FnOnce(&mut dyn Collective) -> Result<T, Error> + Send + 'static,
    ) -> Ticket<T> {
        let (answer, result) = channel();
        let failure = self.failure.clone();
        // What comes after it does not hold the exchange up.
        let computed = self.gpu.map(|gpu| gpu.mark_computing());
        let rank = self.rank;
        let exchange = move |collective: &mut dyn Collective| {
            if let Some(computed) = computed {
                let failed = |Problem(problem)| Error::Nccl { rank, operation: "follow", bytes: 0, problem };
                collective.follow(computed.map_err(failed)?)?;
            }
            exchange(collective)
        };
        let job = move |collective: &mut dyn Collective| {
            let outcome = catch_unwind(AssertUnwindSafe(|| exchange(collective)));
            match outcome.unwrap_or_else(|panic| Err(Error::Panicked(words(panic.as_ref())))) {
                // Nobody waits any more where the step has ended already.
                Ok(value) => {
                    drop(answer.send(value));
                    true
                }
                // Known before the ticket hears that no answer comes: `answer` is still there.
                Err(error) => {
                    failure.set(error);
                    false
                }
            }
        };
        match &mut self.hands {
            Hands::Own(collective) => {
                job(collective.as_mut());
            }
            // The thread is gone after a failure; then the ticket says so.
            Hands::Thread(jobs, _) => drop(jobs.as_ref().map(|jobs| jobs.send(Box::new(job)))),
        }
        Ticket { result, failure: self.failure.clone(), progress: self.progress.clone() }
    }
}

fn carry(mut collective: Box<dyn Collective + Send>, queue: &Receiver<Job>, pulse: &Pulse) {
    for job in queue {
        fail_point::reached("exchange");
        pulse.begin();
        let goes_on = job(collective.as_mut());
        pulse.end();
        if !goes_on {
            return;
        }
    }
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without words").to_owned()
}

impl Drop for Courier {
    fn drop(&mut self) {
        let Hands::Thread(jobs, thread) = &mut self.hands else { return };
        drop(jobs.take());
        if let Some(thread) = thread.take() {
            if !thread.is_finished() {
                // What is under way belongs to a step that nobody will finish.
                self.stopper.stop();
            }
            // A panic in it was told by the ticket that nobody answered.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tcp::tests::mesh;
    use super::*;
    use std::time::{Duration, Instant};

    fn couriers(world: usize) -> Vec<Courier> {
        let with = |mesh: super::super::tcp::Mesh| {
            let stopper = mesh.stopper().clone();
            Courier::new(Box::new(mesh), &stopper)
        };
        mesh(world).into_iter().map(with).collect()
    }

    #[test]
    fn exchanges_are_carried_out_in_order_and_behind_their_ticket() {
        for world in [1, 2, 3] {
            let mut couriers = couriers(world);
            let tickets: Vec<Vec<_>> = couriers
                .iter_mut()
                .map(|courier| {
                    let rank = courier.rank() as u8;
                    let one = |i: u8| courier.send(move |c: &mut dyn Collective| c.all_gather_bytes(&[i, rank]));
                    [1, 2, 3].map(one).into_iter().collect()
                })
                .collect();
            for tickets in tickets {
                for (i, ticket) in (1..).zip(tickets) {
                    let expected: Vec<Vec<u8>> = (0..world as u8).map(|rank| vec![i, rank]).collect();
                    assert_eq!(ticket.wait().unwrap(), expected);
                }
            }
        }
    }

    #[test]
    fn the_first_failure_is_told_once_and_nothing_follows_it() {
        let mut couriers = couriers(2);
        drop(couriers.pop());
        couriers[0].check().unwrap();
        let mut left = couriers.pop().unwrap();
        let first = left.send(|c: &mut dyn Collective| c.all_gather_bytes(b"x"));
        let second = left.send(|c: &mut dyn Collective| c.all_gather_bytes(b"y"));
        // Whoever waits first learns it.
        assert!(matches!(second.wait(), Err(Error::Lost { peer: 1, operation: "exchange", .. })));
        assert!(matches!(first.wait(), Err(Error::Stopped)));
        assert!(matches!(left.send(|_| Ok(())).wait(), Err(Error::Stopped)));
        // Who computes meanwhile learns it too.
        left.failure.set(Error::Stopped);
        assert!(left.check().is_err());
        left.check().unwrap();
        left.stopper.stop();
        assert!(left.check().is_err());
    }

    #[test]
    fn a_panic_in_an_exchange_is_told_in_its_words() {
        for world in [1, 2] {
            let mut couriers = couriers(world);
            let broken = couriers[0].send(|_| -> Result<(), Error> { panic!("the {} is out of tune", "second voice") });
            let error = broken.wait().unwrap_err();
            assert!(matches!(&error, Error::Panicked(said) if said == "the second voice is out of tune"), "{error}");
        }
    }

    #[test]
    fn giving_up_does_not_wait_for_a_silent_peer() {
        let mut couriers = couriers(2);
        let begun = Instant::now();
        let blocked = couriers[0].send(|c: &mut dyn Collective| c.all_gather_bytes(b"x"));
        couriers[0].check().unwrap();
        drop(couriers.remove(0));
        assert!(blocked.wait().is_err());
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
