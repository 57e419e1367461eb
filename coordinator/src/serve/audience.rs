//! Who looks on at a run, and when each is told more. All that is common is done once for everybody: an entry is encoded when
//! it is written, and pages of them are shared. Viewers that are up to date are told in turn, at most [`TURN`] of them every
//! [`PAUSE`], however often there is news; one that takes nothing is not looked at again until it is cut off.

use super::accept::Gate;
use super::pages::{Page, Recent};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout, Instant};
use unisono_proto::v1::Event;

/// Viewers that are told at a time, and the pause before the next ones are: a few see every step as it is committed, a
/// thousand hear every two seconds what happened since.
const TURN: usize = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// What a viewer finds that asks for more.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Page(Page),
    /// It is not in memory any more.
    InTheLedger,
    /// There is nothing yet; it is told when there is.
    Later,
    /// Nothing will follow.
    Over,
}

enum State {
    /// Up to date.
    Waits(Waker),
    /// Something is read for it.
    Reads,
    /// Something is on its way to it.
    Takes { since: Instant },
}

struct Viewer {
    state: State,
    gate: Option<Gate>,
}

struct Crowd {
    viewers: BTreeMap<u64, Viewer>,
    /// Names given so far.
    names: u64,
    /// Those who wait, and the last entry that each was told; of those who have left since, the names only.
    queue: VecDeque<(u64, u64)>,
    recent: Recent,
    /// Sequence number of the newest durable entry.
    newest: u64,
    over: bool,
}

/// Everybody who looks on.
pub struct Audience {
    crowd: Mutex<Crowd>,
    news: Notify,
    /// How long a viewer may take nothing of what is there for it.
    patience: Duration,
}

impl Audience {
    /// Of a run whose ledger has `newest` entries.
    pub fn new(newest: u64, patience: Duration) -> Arc<Self> {
        let (viewers, queue, recent) = (BTreeMap::new(), VecDeque::new(), Recent::default());
        let crowd = Mutex::new(Crowd { viewers, names: 0, queue, recent, newest, over: false });
        Arc::new(Audience { crowd, news: Notify::new(), patience })
    }

    /// These entries are durable; none will follow if the run is `over`.
    pub fn tell(&self, events: &[Event], over: bool) {
        let mut crowd = self.crowd();
        crowd.recent.extend(events);
        crowd.newest = events.last().map_or(crowd.newest, |event| event.sequence);
        crowd.over |= over;
        let heard = !crowd.queue.is_empty();
        drop(crowd);
        if heard || over {
            self.news.notify_one();
        }
    }

    /// A new viewer's name. `gate` is cut where it takes nothing.
    pub fn enter(&self, gate: Option<Gate>) -> u64 {
        let mut crowd = self.crowd();
        crowd.names += 1;
        let name = crowd.names;
        crowd.viewers.insert(name, Viewer { state: State::Takes { since: Instant::now() }, gate });
        name
    }

    pub fn leave(&self, name: u64) {
        let crowd = &mut *self.crowd();
        crowd.viewers.remove(&name);
        if crowd.queue.len() > 2 * crowd.viewers.len() + 64 {
            crowd.queue.retain(|(name, _)| crowd.viewers.contains_key(name));
        }
    }

    /// What comes after `cursor` for the viewer `name`, which has taken what it was given before.
    pub fn next(&self, name: u64, cursor: u64, waker: &Waker) -> Next {
        let mut crowd = self.crowd();
        let (next, state) = match cursor < crowd.newest {
            true => match crowd.recent.after(cursor) {
                Some(page) => (Next::Page(page), State::Takes { since: Instant::now() }),
                None => (Next::InTheLedger, State::Reads),
            },
            false if crowd.over => (Next::Over, State::Takes { since: Instant::now() }),
            false => (Next::Later, State::Waits(waker.clone())),
        };
        let queued = matches!(&state, State::Waits(_));
        let Some(viewer) = crowd.viewers.get_mut(&name) else { return Next::Over };
        let before = std::mem::replace(&mut viewer.state, state);
        if queued && !matches!(before, State::Waits(_)) {
            // The queue ascends: who asks for what may never come is told with all others.
            let told = cursor.min(crowd.newest);
            crowd.queue.push_back((name, told));
        }
        next
    }

    /// What was read for the viewer `name` is on its way to it.
    pub fn sent(&self, name: u64) {
        if let Some(viewer) = self.crowd().viewers.get_mut(&name) {
            viewer.state = State::Takes { since: Instant::now() };
        }
    }

    /// Tells everybody in turn, for as long as it is polled.
    pub async fn usher(self: Arc<Self>) {
        let every = self.patience / 8;
        let mut swept = Instant::now();
        loop {
            match self.wake() {
                0 => drop(timeout(every, self.news.notified()).await),
                _ => sleep(PAUSE).await,
            }
            if swept.elapsed() >= every {
                swept = Instant::now();
                self.sweep();
            }
        }
    }

    /// Tells those whose turn it is; at the end of the run, all. How many these were.
    fn wake(&self) -> usize {
        let mut crowd = self.crowd();
        let most = if crowd.over { usize::MAX } else { TURN };
        let mut woken = Vec::new();
        while let (true, Some(&(name, cursor))) = (woken.len() < most, crowd.queue.front()) {
            // Who waits longest was told least.
            if cursor >= crowd.newest && !crowd.over {
                break;
            }
            crowd.queue.pop_front();
            let Some(viewer) = crowd.viewers.get_mut(&name) else { continue };
            if let State::Waits(_) = viewer.state {
                let state = State::Takes { since: Instant::now() };
                if let State::Waits(waker) = std::mem::replace(&mut viewer.state, state) {
                    woken.push(waker);
                }
            }
        }
        drop(crowd);
        let told = woken.len();
        woken.into_iter().for_each(Waker::wake);
        told
    }

    /// Cuts off who takes nothing.
    fn sweep(&self) {
        let mut deaf = Vec::new();
        let mut crowd = self.crowd();
        for viewer in crowd.viewers.values_mut() {
            if matches!(viewer.state, State::Takes { since } if since.elapsed() >= self.patience) {
                deaf.extend(viewer.gate.take());
            }
        }
        drop(crowd);
        if !deaf.is_empty() {
            tracing::debug!(viewers = deaf.len(), "viewers that read nothing are cut off");
        }
        // Pings are answered by its side of the connection, whoever reads or not: only the end of all of it frees what waits
        // there. Whoever wakes up connects again, and goes on where it was.
        deaf.iter().for_each(Gate::end);
    }

    #[cfg(test)]
    fn waits(&self, name: u64) -> bool {
        self.crowd().viewers.get(&name).is_some_and(|viewer| matches!(viewer.state, State::Waits(_)))
    }

    fn crowd(&self) -> MutexGuard<'_, Crowd> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Held by who writes the ledger: when it goes, however it does, nothing will follow.
pub struct Stage(pub Arc<Audience>);

impl Stage {
    pub fn tell(&self, events: &[Event], over: bool) {
        self.0.tell(events, over);
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.0.tell(&[], true);
    }
}

#[cfg(test)]
mod tests {
    use super::super::pages::tests::{entries, read};
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    const PATIENCE: Duration = Duration::from_secs(30);

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Everything up to `newest` as the viewer `name` is given it.
    fn catch_up(audience: &Audience, name: u64, cursor: &mut u64, waker: &Waker) -> Vec<u64> {
        let mut seen = Vec::new();
        loop {
            match audience.next(name, *cursor, waker) {
                Next::Page(page) => {
                    *cursor = page.last;
                    seen.extend(read(page));
                }
                Next::Later => return seen,
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn viewers_that_are_told_together_get_the_same_bytes() {
        let audience = Audience::new(0, PATIENCE);
        audience.tell(&entries(1..=300), false);
        let mut pages = BTreeMap::new();
        let names: Vec<u64> = (0..1000).map(|_| audience.enter(None)).collect();
        for cursor in [0, 100, 250] {
            for &name in &names {
                let Next::Page(page) = audience.next(name, cursor, Waker::noop()) else { panic!("no page") };
                pages.insert(page.bytes.as_ptr(), page);
            }
        }
        assert_eq!(pages.len(), 3, "each page is made once");
    }

    /// What a step costs does not grow with those who take nothing: none of them is woken, and nothing is looked for.
    #[test]
    fn a_thousand_viewers_that_take_nothing_are_never_woken() {
        let audience = Audience::new(0, PATIENCE);
        let woken = Arc::new(Woken::default());
        audience.tell(&entries(1..=1), false);
        for _ in 0..1000 {
            let name = audience.enter(None);
            assert!(matches!(audience.next(name, 0, &woken.clone().into()), Next::Page(_)));
        }
        for step in 2..=400 {
            audience.tell(&entries(step..=step), false);
            assert_eq!(audience.wake(), 0);
        }
        assert_eq!(woken.0.load(Ordering::SeqCst), 0);
    }

    /// However often there is news, wake-ups are as many as turns allow, everybody's turn comes, and nobody misses an entry.
    #[tokio::test]
    async fn a_thousand_viewers_are_woken_in_turn() {
        const VIEWERS: usize = 1000;
        let audience = Audience::new(0, PATIENCE);
        let woken: Vec<Arc<Woken>> = (0..VIEWERS).map(|_| Arc::default()).collect();
        let mut viewers: Vec<(u64, u64, Vec<u64>)> =
            (0..VIEWERS).map(|_| (audience.enter(None), 0, Vec::new())).collect();
        for ((name, cursor, _), woken) in viewers.iter_mut().zip(&woken) {
            assert!(catch_up(&audience, *name, cursor, &woken.clone().into()).is_empty());
        }
        let usher = tokio::spawn(audience.clone().usher());
        let begun = Instant::now();
        let mut step = 0;
        while woken.iter().any(|woken| woken.0.load(Ordering::SeqCst) < 2) {
            assert!(begun.elapsed() < Duration::from_secs(60), "somebody is not told");
            step += 1;
            audience.tell(&entries(step..=step), false);
            sleep(Duration::from_millis(1)).await;
            for ((name, cursor, seen), woken) in viewers.iter_mut().zip(&woken) {
                if woken.0.load(Ordering::SeqCst) > 0 && !audience.waits(*name) {
                    seen.extend(catch_up(&audience, *name, cursor, &woken.clone().into()));
                }
            }
        }
        let turns = begun.elapsed().as_millis() / PAUSE.as_millis() + 1;
        let wakes: usize = woken.iter().map(|woken| woken.0.load(Ordering::SeqCst)).sum();
        assert!(wakes as u128 <= turns * TURN as u128, "{wakes} wake-ups in {turns} turns");
        assert!(step as usize * VIEWERS > 4 * wakes, "{step} steps, {wakes} wake-ups");
        assert!(woken.iter().all(|woken| woken.0.load(Ordering::SeqCst) <= 3), "somebody is told before others");
        usher.abort();
        for (name, mut cursor, mut seen) in viewers {
            seen.extend(catch_up(&audience, name, &mut cursor, Waker::noop()));
            assert!(seen.into_iter().eq(1..=step));
        }
    }

    #[test]
    fn who_asks_for_what_may_never_come_holds_nobody_up() {
        let audience = Audience::new(7, PATIENCE);
        let (strange, usual) = (audience.enter(None), audience.enter(None));
        assert_eq!(audience.next(strange, u64::MAX, Waker::noop()), Next::Later);
        assert_eq!(audience.next(usual, 7, Waker::noop()), Next::Later);
        audience.tell(&entries(8..=8), false);
        assert_eq!(audience.wake(), 2);
        assert_eq!(audience.next(strange, u64::MAX, Waker::noop()), Next::Later);
        (0..500).for_each(|_| {
            let name = audience.enter(None);
            assert_eq!(audience.next(name, 8, Waker::noop()), Next::Later);
            audience.leave(name);
        });
        assert!(audience.crowd().queue.len() < 100, "those who left are forgotten");
    }

    #[test]
    fn the_end_is_told_to_all_and_comes_however_the_writer_goes() {
        let audience = Audience::new(7, PATIENCE);
        let stage = Stage(audience.clone());
        let names: Vec<u64> = (0..100).map(|_| audience.enter(None)).collect();
        for &name in &names {
            assert_eq!(audience.next(name, 6, Waker::noop()), Next::InTheLedger, "of an earlier start");
            assert_eq!(audience.next(name, 7, Waker::noop()), Next::Later);
        }
        audience.leave(names[0]);
        drop(stage);
        assert_eq!(audience.wake(), 99);
        assert_eq!(audience.next(names[1], 7, Waker::noop()), Next::Over);
    }

    #[tokio::test]
    async fn who_takes_nothing_is_cut_off_and_who_waits_is_not() {
        let audience = Audience::new(5, Duration::from_millis(50));
        audience.tell(&entries(6..=6), false);
        let gates: Vec<_> = (0..3).map(|_| Gate::new()).collect();
        let names: Vec<u64> = gates.iter().map(|(gate, _)| audience.enter(Some(gate.clone()))).collect();
        assert!(matches!(audience.next(names[0], 5, Waker::noop()), Next::Page(_)));
        assert_eq!(audience.next(names[1], 6, Waker::noop()), Next::Later);
        assert_eq!(audience.next(names[2], 0, Waker::noop()), Next::InTheLedger);
        sleep(Duration::from_millis(60)).await;
        audience.sweep();
        let ended: Vec<bool> = gates.into_iter().map(|(_, mut ended)| ended.try_recv().is_ok()).collect();
        assert_eq!(ended, [true, false, false]);
    }
}
