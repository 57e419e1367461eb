//! Worlds of threads over loopback: right sums, right order, and every failure names its culprit.

use super::*;
use crate::ops::view;
use std::time::Instant;
use tch::{Device, Kind};

/// A membership of `world` ranks on loopback with short timeouts, and each rank's listener.
pub fn memberships(world: usize, timeout: f64) -> Vec<(TcpListener, Membership)> {
    let listeners: Vec<_> = (0..world).map(|_| listen("127.0.0.1").unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(|(_, address)| address.clone()).collect();
    listeners
        .into_iter()
        .enumerate()
        .map(|(rank, (listener, _))| {
            let timeout = Duration::from_secs_f64(timeout);
            let (addresses, key) = (addresses.clone(), [7; 32]);
            (listener, Membership { rank, addresses, key, term: 3, generation: 5, timeout, lends: true })
        })
        .collect()
}

fn meet_all(members: Vec<(TcpListener, Membership)>) -> Vec<Result<Mesh, Error>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            members.iter().map(|(l, m)| scope.spawn(|| Mesh::meet(l, m, &Stopper::default()))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// `world` ranks that have met.
pub fn mesh(world: usize) -> Vec<Mesh> {
    meet_all(memberships(world, 20.0)).into_iter().map(|m| m.unwrap()).collect()
}

fn each<T: Send>(world: usize, work: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    each_lending(world, |_| true, work)
}

/// The same where only some ranks read from memory, or can be read.
fn each_lending<T: Send>(world: usize, lends: fn(usize) -> bool, work: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    let mut members = memberships(world, 20.0);
    members.iter_mut().for_each(|(_, member)| member.lends = lends(member.rank));
    std::thread::scope(|scope| {
        let meshes = meet_all(members).into_iter().map(|m| m.unwrap());
        let threads: Vec<_> = meshes.map(|m| scope.spawn(|| work(m))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn owners(world: usize, length: usize) -> Vec<Range<usize>> {
    (0..world).map(|r| r * length / world..(r + 1) * length / world).collect()
}

const LENDING: [fn(usize) -> bool; 3] = [|_| true, |_| false, |rank| rank != 1];

#[test]
fn reduce_scatter_gives_each_owner_the_total_and_leaves_the_rest() {
    // Longer than two pieces, with magnitudes of every width.
    let length = 3 * PIECE + 17;
    let value =
        |rank: usize, i: usize| ((i as i64).wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64) >> (i % 60)) >> (3 + rank);
    for (world, lends) in [1, 2, 3, 5].into_iter().flat_map(|world| LENDING.map(|lends| (world, lends))) {
        let owners = owners(world, length);
        let results = each_lending(world, lends, |mut mesh| {
            let together = |peer: &usize| lends(*peer) && lends(mesh.rank) && *peer != mesh.rank;
            let neighbours = (0..world).filter(|&peer| mesh.neighbours[peer].is_some());
            assert!(neighbours.eq((0..world).filter(together)), "whoever can reads from memory");
            let mut sums: Vec<i64> = (0..length).map(|i| value(mesh.rank(), i)).collect();
            mesh.reduce_scatter(&mut sums, &owners).unwrap();
            sums
        });
        for (rank, sums) in results.iter().enumerate() {
            for (i, &sum) in sums.iter().enumerate() {
                let total = (0..world).map(|r| value(r, i)).fold(0i64, i64::wrapping_add);
                let expected = if owners[rank].contains(&i) { total } else { value(rank, i) };
                assert_eq!(sum, expected, "world {world}, rank {rank}, element {i}");
            }
        }
    }
}

#[test]
fn all_gather_spreads_every_owner_s_elements() {
    let worlds = [(1, Kind::Float), (2, Kind::Float), (3, Kind::BFloat16), (5, Kind::Float)].into_iter();
    for ((world, kind), lends) in worlds.flat_map(|world| LENDING.map(|lends| (world, lends))) {
        let length = 1003;
        let owners = owners(world, length);
        let whole = || Tensor::arange(length as i64, (Kind::Float, Device::Cpu)).to_kind(kind);
        let results = each_lending(world, lends, |mut mesh| {
            let own = &owners[mesh.rank()];
            let mut bucket = Tensor::zeros([length as i64], (kind, Device::Cpu));
            view::part(&bucket, own).copy_(&view::part(&whole(), own));
            mesh.all_gather(&mut bucket, &owners).unwrap();
            bucket
        });
        assert!(results.iter().all(|bucket| *bucket == whole()));
    }
}

#[test]
fn bytes_come_in_rank_order_and_may_differ_in_length() {
    for world in [1, 2, 3, 5] {
        let expected: Vec<Vec<u8>> = (0..world).map(|r| vec![r as u8; r * 3]).collect();
        let results = each(world, |mut mesh| mesh.all_gather_bytes(&vec![mesh.rank() as u8; mesh.rank() * 3]).unwrap());
        assert!(results.iter().all(|all| *all == expected));
    }
}

#[test]
fn another_key_or_generation_is_refused() {
    let spoil: [fn(&mut Membership); 3] = [|m| m.key[31] ^= 1, |m| m.generation += 1, |m| m.term -= 1];
    for change in spoil {
        let mut members = memberships(2, 0.5);
        change(&mut members[1].1);
        let outcomes = meet_all(members);
        let sentences: Vec<_> = outcomes.iter().map(|o| o.as_ref().err().expect("no meeting").to_string()).collect();
        assert!(matches!(&outcomes[0], Err(Error::Missing { peer: 1, .. })), "{sentences:?}");
        assert!(matches!(&outcomes[1], Err(Error::Refused { peer: 0, .. })), "{sentences:?}");
        assert!(sentences[1].contains("rank 0"), "{sentences:?}");
    }
}

#[test]
fn a_stranger_does_not_take_a_peer_s_place() {
    let members = memberships(2, 20.0);
    let mut stranger = TcpStream::connect(&members[0].1.addresses[0]).unwrap();
    stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let silent = TcpStream::connect(&members[0].1.addresses[0]).unwrap();
    let started = Instant::now();
    meet_all(members).into_iter().for_each(|mesh| drop(mesh.unwrap()));
    assert!(started.elapsed() < Duration::from_secs(5), "nobody waits for the silent one");
    drop((silent, stranger));
}

#[test]
fn a_silent_peer_is_named_with_operation_and_bytes() {
    let mut members = memberships(3, 20.0);
    members.iter_mut().for_each(|(_, m)| m.timeout = Duration::from_millis(400));
    let mut ranks: Vec<_> = meet_all(members).into_iter().map(|m| m.unwrap()).collect();
    let silent = ranks.pop().unwrap();
    let errors: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter_mut()
            .map(|mesh| scope.spawn(|| mesh.reduce_scatter(&mut [1; 30], &owners(3, 30)).unwrap_err()))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    // Rank 0 hears rank 2 in its first round.
    assert!(matches!(errors[0], Error::Silent { peer: 2, operation: "reduce", bytes: 240, .. }), "{:?}", errors[0]);
    drop(silent);
}

#[test]
fn a_lost_peer_is_named() {
    let mut ranks = mesh(2);
    drop(ranks.pop());
    let error = ranks[0].all_gather_bytes(b"x").unwrap_err();
    assert!(matches!(error, Error::Lost { peer: 1, operation: "exchange", .. }), "{error:?}");
}

#[test]
fn a_blocked_exchange_ends_when_stopped() {
    let mut ranks = mesh(2);
    let silent = ranks.pop().unwrap();
    let mut mesh = ranks.pop().unwrap();
    let stopper = mesh.stopper.clone();
    let started = Instant::now();
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| mesh.reduce_scatter(&mut vec![1 << 40; 4 << 20], &owners(2, 4 << 20)));
        std::thread::sleep(Duration::from_millis(100));
        stopper.stop();
        assert!(matches!(blocked.join().unwrap(), Err(Error::Stopped)));
    });
    assert!(started.elapsed() < Duration::from_secs(5));
    drop(silent);
}

#[test]
fn workers_out_of_step_notice() {
    let errors = each(2, |mut mesh| match mesh.rank() {
        0 => mesh.all_gather_bytes(b"x").err(),
        _ => mesh.reduce_scatter(&mut [1; 8], &owners(2, 8)).err(),
    });
    assert!(errors.iter().flatten().any(|e| matches!(e, Error::Protocol { .. })), "{errors:?}");
}

/// Two ranks with little patience, which somebody else judges instead, and the pulse of rank 0.
fn judged() -> (Mesh, Mesh, Pulse) {
    let mut ranks = meet_all(memberships(2, 0.3)).into_iter().map(|m| m.unwrap());
    let (mut first, mut second) = (ranks.next().unwrap(), ranks.next().unwrap());
    let pulse = Pulse::default();
    first.heard_by(&pulse);
    second.heard_by(&Pulse::default());
    (first, second, pulse)
}

#[test]
fn a_peer_that_comes_late_is_waited_for_where_somebody_else_judges() {
    let (mut first, mut second, pulse) = judged();
    let owners = [0..15, 15..30];
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut sums = [1; 30];
            let idle = Instant::now();
            pulse.begin();
            first.reduce_scatter(&mut sums, &owners).unwrap();
            (sums[0], idle.elapsed())
        });
        let begun = Instant::now();
        std::thread::sleep(Duration::from_millis(1000));
        let exchange = pulse.told(Some(begun)).expect("under way");
        assert_eq!((exchange.operation.as_str(), exchange.bytes, exchange.peer), ("reduce", 240, Some(1)));
        assert!(exchange.seconds > 0.8, "{exchange:?}");
        second.reduce_scatter(&mut [2; 30], &owners).unwrap();
        let (sum, waited) = waiting.join().unwrap();
        assert!(sum == 3 && waited > Duration::from_millis(900), "three times as long as it would be waited for else");
    });
}

#[test]
fn a_wait_that_somebody_else_judges_ends_when_stopped_or_with_the_connection() {
    for stopped in [true, false] {
        let (mut first, second, _) = judged();
        let stopper = first.stopper.clone();
        std::thread::scope(|scope| {
            let blocked = scope.spawn(|| first.all_gather_bytes(b"x").unwrap_err());
            std::thread::sleep(Duration::from_millis(600));
            assert!(!blocked.is_finished());
            match stopped {
                true => stopper.stop(),
                false => drop(second),
            }
            let error = blocked.join().unwrap();
            assert_eq!(matches!(error, Error::Stopped), stopped, "{error:?}");
            assert_eq!(matches!(error, Error::Lost { peer: 1, .. }), !stopped, "{error:?}");
        });
    }
}

#[test]
fn bytes_that_trickle_are_all_kept_and_each_is_a_movement() {
    let (mut first, second, pulse) = judged();
    pulse.begin();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| first.all_gather_bytes(b"mine").unwrap());
        let mut stream = second.peers[0].as_ref().unwrap();
        let words = [&header(Tag::Bytes, 3)[..], b"abc"].concat();
        let begun = Instant::now();
        for byte in words {
            std::thread::sleep(Duration::from_millis(60));
            stream.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            let told = pulse.told(Some(begun)).unwrap();
            assert!(told.seconds < 0.5, "something has just moved: {told:?}");
        }
        assert!(begun.elapsed() > Duration::from_millis(900));
        assert_eq!(waiting.join().unwrap(), [b"mine".to_vec(), b"abc".to_vec()]);
        let mut heard = [0; 13];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(heard, [&header(Tag::Bytes, 4)[..], b"mine"].concat()[..]);
    });
}
