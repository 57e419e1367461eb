//! Who is patient with whom: as long as anybody computes everybody waits, and then the one that all wait for is named.

use super::event::{Connection, Event};
use super::phases::Phase;
use super::simulated::World;
use unisono_configs::run::Assignment;
use unisono_proto::v1::event::Body as Entry;
use unisono_proto::v1::worker_message::Body as Report;
use unisono_proto::v1::{Exchange, Heartbeat, Phase as Place, WorkerMessage};

/// Three workers that have been told what to do.
fn running() -> World {
    let mut world = World::new(3, 9, Assignment::Balanced);
    (0..3).for_each(|rank| assert!(world.say(Connection(rank)), "it is ready"));
    assert_eq!(world.machine.phase(), Phase::Running);
    world
}

/// It has waited for `peer` in exchange `number`.
fn exchanging(number: u64, peer: Option<u32>, seconds: f64) -> Heartbeat {
    let exchange = Exchange { number, operation: "reduce".into(), bytes: 240, peer, seconds };
    // What follows from the phase alone is no matter.
    Heartbeat { phase: Place::Forward.into(), seconds: 9999.0, exchange: Some(exchange), ..Heartbeat::default() }
}

fn computing() -> Heartbeat {
    Heartbeat { phase: Place::Forward.into(), seconds: 1.0, ..Heartbeat::default() }
}

fn waiting(seconds: f64) -> Heartbeat {
    Heartbeat { phase: Place::Gather.into(), seconds, waits: true, ..Heartbeat::default() }
}

fn beat(world: &mut World, rank: u64, heartbeat: Heartbeat) {
    let epoch = world.workers[&Connection(rank)].epoch;
    let message = WorkerMessage { epoch, body: Some(Report::Heartbeat(heartbeat)) };
    world.apply(Event::Message { from: Connection(rank), message }).unwrap();
}

/// Who is named, and how, once time has passed.
fn judged(world: &mut World) -> Option<(u32, String)> {
    world.apply(Event::Tick).unwrap();
    match world.ledger.last() {
        Some(Entry::Lost(lost)) => {
            assert_eq!(world.machine.phase(), Phase::Gathering, "the others go on");
            let failure = lost.failure.clone().unwrap();
            Some((failure.rank.unwrap(), failure.message))
        }
        _ => None,
    }
}

fn told(world: &mut World, heartbeats: [Heartbeat; 3]) -> Option<(u32, String)> {
    (0..).zip(heartbeats).for_each(|(rank, heartbeat)| beat(world, rank, heartbeat));
    judged(world)
}

#[test]
fn when_all_wait_for_each_other_the_one_that_waits_for_nobody_is_named() {
    // A chain that ends at rank 1, which is not behind.
    let chain = [exchanging(7, Some(2), 61.0), exchanging(7, None, 62.0), exchanging(7, Some(1), 60.5)];
    let (rank, message) = told(&mut running(), chain).unwrap();
    assert_eq!(rank, 1);
    assert!(message.contains("rank 2 on ada has waited for it in reduce (240 bytes) for 60.5 s"), "{message}");
    assert!(message.contains("cluster.peer_timeout"), "{message}");
    // In a circle it is the one that is furthest behind.
    let circle = [exchanging(7, Some(2), 61.0), exchanging(7, Some(0), 61.0), exchanging(6, Some(1), 61.0)];
    assert_eq!(told(&mut running(), circle).unwrap().0, 2);
    // NCCL does not say whom it waits for.
    let blind = [exchanging(7, None, 61.0), exchanging(6, None, 61.0), exchanging(7, None, 61.0)];
    let (rank, message) = told(&mut running(), blind).unwrap();
    assert!(rank == 1 && message.contains("nobody is further behind"), "{rank}: {message}");
}

#[test]
fn nobody_is_given_up_as_long_as_somebody_computes_or_is_owed_something_or_bytes_move() {
    let stuck = || exchanging(7, Some(2), 3000.0);
    // Sharded parameters are waited for in the middle of a pass: the phase's own deadline is no matter.
    assert_eq!(told(&mut running(), [stuck(), stuck(), computing()]), None);
    assert_eq!(told(&mut running(), [stuck(), stuck(), exchanging(7, Some(0), 59.0)]), None);
    assert_eq!(told(&mut running(), [stuck(), stuck(), waiting(3000.0)]), None, "it waits for a micro-batch");
    let under_way = Heartbeat { waits: true, ..exchanging(7, None, 3000.0) };
    assert_eq!(told(&mut running(), [stuck(), stuck(), under_way]), None);
    // A word that came since says that it got on.
    let mut world = running();
    (0..3).for_each(|rank| beat(&mut world, rank, stuck()));
    assert!(world.say(Connection(0)));
    assert_eq!(judged(&mut world), None);
    // Each stood still for long enough, but not at one time.
    let mut world = running();
    [0, 1].into_iter().for_each(|rank| beat(&mut world, rank, exchanging(7, Some(2), 61.0)));
    world.now += 3.0;
    beat(&mut world, 2, exchanging(7, None, 61.0));
    assert_eq!(judged(&mut world), None);
    [0, 1].into_iter().for_each(|rank| beat(&mut world, rank, exchanging(7, Some(2), 64.0)));
    assert_eq!(judged(&mut world).unwrap().0, 2);
}

#[test]
fn whoever_has_done_all_that_it_was_told_excuses_nobody() {
    let done = || {
        let mut world = running();
        while world.say(Connection(0)) {}
        world
    };
    let others = |peer| [waiting(70.0), exchanging(7, Some(peer), 61.0), exchanging(7, None, 61.0)];
    assert_eq!(told(&mut done(), others(2)).unwrap().0, 2);
    let [_, one, _] = others(0);
    let (rank, message) = told(&mut done(), [waiting(70.0), one.clone(), exchanging(7, Some(1), 61.0)]).unwrap();
    assert!(rank == 0 && message.contains("rank 1 on ada has waited for it"), "{rank}: {message}");
    assert_eq!(told(&mut done(), [waiting(5.0), one, exchanging(7, Some(1), 61.0)]), None, "only since now");
    // Where none exchanges anything, they wait for the coordinator.
    let mut world = running();
    (0..3).for_each(|rank| while world.say(Connection(rank)) {});
    let last = world.ledger.len();
    assert_eq!(told(&mut world, [(); 3].map(|()| waiting(3000.0))), None);
    assert_eq!(world.ledger.len(), last);
}

#[test]
fn loading_stands_still_too() {
    let mut world = World::new(3, 9, Assignment::Balanced);
    assert!(world.say(Connection(0)));
    assert_eq!(world.machine.phase(), Phase::Loading);
    let heartbeats = [waiting(61.0), exchanging(2, Some(2), 61.0), exchanging(1, None, 61.0)];
    let (rank, message) = told(&mut world, heartbeats).unwrap();
    assert!(rank == 2 && message.contains("rank 1 on ada"), "{rank}: {message}");
}
