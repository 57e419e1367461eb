//! Standstills: nobody computes, everybody waits for somebody else, and nothing moves between the workers. Each of them alone
//! cannot tell that from a peer that computes for longer than it does; whoever hears all of them can.

use super::machine::Machine;
use super::phases::Phase;
use super::roster::Worker;
use unisono_proto::v1::{Exchange, Heartbeat};

impl Machine {
    /// Whom a standstill that has lasted for longer than `cluster.peer_timeout` is due to, and how that is said.
    pub(super) fn standstill(&self) -> Option<(usize, String)> {
        if !matches!(self.phase, Phase::Loading | Phase::Running) {
            return None;
        }
        let here = || self.roster.workers().iter().enumerate().filter(|(_, worker)| !worker.drained);
        let (mut begin, mut end) = (f64::NEG_INFINITY, f64::INFINITY);
        for (_, worker) in here() {
            // What a heartbeat tells was so when it came: there must have been time in which it was so of all.
            let still = self.stands_still_for(worker)?;
            (begin, end) = (begin.max(worker.beat - still), end.min(worker.beat));
        }
        let seconds = end - begin;
        let waiting = || here().filter_map(|(rank, w)| Some((rank, w, w.heartbeat.exchange.as_ref()?)));
        if seconds <= self.settings.assign.peer_timeout || waiting().next().is_none() {
            return None;
        }
        let waits_for = |rank: usize| move |(_, _, e): &(usize, &Worker, &Exchange)| e.peer == Some(rank as u32);
        let guilt = |(rank, worker): &(usize, &Worker)| {
            let exchange = worker.heartbeat.exchange.as_ref();
            let waits = exchange.is_some_and(|exchange| exchange.peer.is_some());
            let innocent = !waiting().any(|who| waits_for(*rank)(&who));
            // Who has nothing to exchange any more is behind nobody.
            let number = exchange.map_or(u64::MAX, |exchange| exchange.number);
            (waits, innocent, number, worker.answered, worker.phase())
        };
        let (rank, _) = here().min_by_key(guilt)?;
        let how = match waiting().find(waits_for(rank)) {
            Some((by, worker, Exchange { operation, bytes, .. })) => format!(
                "rank {by} on {} has waited for it in {operation} ({bytes} bytes) for {seconds:.1} s, in which nobody computed and nothing moved between the workers; look at its log and at the network between the two, or raise cluster.peer_timeout",
                worker.join.host
            ),
            None => {
                let (_, _, Exchange { operation, bytes, .. }) = waiting().next()?;
                format!(
                    "for {seconds:.1} s nobody has computed, and nothing has moved between the workers in {operation} ({bytes} bytes); nobody is further behind than this one: look at the logs of all workers and at the network between them, or raise cluster.peer_timeout"
                )
            }
        };
        Some((rank, how))
    }

    /// Seconds for which a worker has computed nothing and got nothing; `None` where it computes, or is owed something.
    fn stands_still_for(&self, worker: &Worker) -> Option<f64> {
        let Heartbeat { seconds, waits, exchange, .. } = &worker.heartbeat;
        let is_done = match self.phase {
            Phase::Loading => worker.ready,
            _ => worker.answered + 1 == self.next_id,
        };
        match exchange {
            // It has done its last, whatever becomes of that.
            _ if worker.complained => Some(f64::INFINITY),
            _ if *waits && !is_done => None,
            Some(exchange) => Some(exchange.seconds),
            None => waits.then_some(*seconds),
        }
    }
}
