//! NCCL's part of the collective, really executed: two to four ranks over the stand-in, against TCP, and in every trouble
//! that the stand-in can make.

use super::stand_in::{Fault, StandIn};
use super::*;
use crate::collective::courier::Courier;
use crate::collective::tcp::tests::{memberships, mesh};
use crate::ops::view::elements;
use std::net::TcpListener;

/// What is exchanged lies where NCCL reaches it, or on the host beside it.
const PLACES: [Device; 2] = [Device::Cpu, Device::Cuda(0)];

fn each<T: Send>(members: Vec<(TcpListener, Membership)>, work: impl Fn(Mesh, &Membership) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let work = &work;
        let one = |(listener, membership): (TcpListener, Membership)| {
            scope.spawn(move || {
                let mesh = Mesh::meet(&listener, &membership, &Stopper::default()).unwrap();
                work(mesh, &membership)
            })
        };
        let threads: Vec<_> = members.into_iter().map(one).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs `work` on every rank of a world; nothing may be left of it.
fn ranks<T: Send>(world: usize, timeout: f64, device: Device, work: impl Fn(&StandIn, Nccl) -> T + Sync) -> Vec<T> {
    let _turn = stand_in::turn();
    let stand_in = StandIn::open();
    let before = stand_in.alive();
    let results = each(memberships(world, timeout), |mesh, membership| {
        let nccl = Nccl::meet(mesh, membership, &stand_in.libraries(device)).unwrap();
        work(&stand_in, nccl)
    });
    assert_eq!(stand_in.alive(), before, "streams, events, memory and communicators are all given back");
    results
}

/// Shards as uneven as can be: longer and shorter ones, one empty.
fn owners(world: usize, length: usize) -> Vec<Range<usize>> {
    let mut weights: Vec<usize> = (0..world).map(|rank| (rank * 7 + 3) % 5).collect();
    weights[0] += 1;
    let all: usize = weights.iter().sum();
    let mut ends: Vec<usize> = weights
        .iter()
        .scan(0, |so_far, weight| {
            *so_far += weight;
            Some(*so_far)
        })
        .map(|sum| sum * length / all)
        .collect();
    *ends.last_mut().unwrap() = length;
    std::iter::once(0).chain(ends.iter().copied()).zip(ends.iter().copied()).map(|(begin, end)| begin..end).collect()
}

fn value(rank: usize, i: usize) -> i64 {
    ((i as i64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15u64 as i64) >> (i % 50)).wrapping_mul(rank as i64 + 3)
}

fn sums(rank: usize, length: usize) -> Vec<i64> {
    (0..length).map(|i| value(rank, i)).collect()
}

#[test]
fn sums_reach_their_owners_as_over_tcp() {
    let length = 70_001;
    for (world, device) in [2, 3, 4].into_iter().flat_map(|world| PLACES.map(|device| (world, device))) {
        let owners = owners(world, length);
        let over_tcp = each(memberships(world, 20.0), |mut mesh, _| {
            let mut sums = sums(mesh.rank(), length);
            mesh.reduce_scatter(&mut sums, &owners).unwrap();
            sums
        });
        let over_nccl = ranks(world, 20.0, device, |_, mut nccl| {
            let mut sums = Tensor::from_slice(&sums(nccl.rank(), length));
            nccl.reduce(&mut sums, &owners).unwrap();
            elements::<i64>(&sums).to_vec()
        });
        assert!(over_nccl == over_tcp, "{world} ranks, {device:?}");
    }
}

#[test]
fn parameters_reach_everybody() {
    let length = 70_001;
    for (kind, device) in [Kind::Float, Kind::BFloat16].into_iter().flat_map(|kind| PLACES.map(|device| (kind, device)))
    {
        let owners = owners(3, length);
        let whole = || Tensor::arange(length as i64, (Kind::Float, Device::Cpu)).to_kind(kind);
        let results = ranks(3, 20.0, device, |_, mut nccl| {
            let own = &owners[nccl.rank()];
            let mut bucket = Tensor::full([length as i64], -1, (kind, Device::Cpu));
            view::part(&bucket, own).copy_(&view::part(&whole(), own));
            nccl.gather(&mut bucket, &owners).unwrap();
            bucket
        });
        assert!(results.iter().all(|bucket| *bucket == whole()));
    }
}

#[test]
fn what_is_longer_than_a_piece_goes_in_pieces() {
    // Of four ranks and 8 bytes each: 3 pieces and a rest, of one rank alone.
    let owners = [0..7, 7..4_200_000, 4_200_000..4_200_000, 4_200_000..4_200_100];
    let all = groups(&owners, 8);
    assert_eq!(all.iter().map(Vec::len).collect::<Vec<_>>(), [3, 1, 1]);
    assert!(all.iter().all(|group| group.iter().map(|(_, range)| 8 * range.len()).sum::<usize>() <= PIECE));
    for (root, owned) in owners.iter().enumerate() {
        let parts: Vec<_> = all.iter().flatten().filter(|(r, _)| *r == root).map(|(_, range)| range.clone()).collect();
        let end = parts.iter().fold(owned.start, |at, range| {
            assert_eq!(range.start, at);
            range.end
        });
        assert_eq!(end, owned.end);
    }
    let results = ranks(4, 20.0, Device::Cuda(0), |_, mut nccl| {
        let mut sums = vec![nccl.rank() as i64 + 1; 4_200_100];
        nccl.reduce_scatter(&mut sums, &owners).unwrap();
        sums
    });
    for (rank, sums) in results.iter().enumerate() {
        let right = |(i, sum): (usize, &i64)| *sum == if owners[rank].contains(&i) { 10 } else { rank as i64 + 1 };
        assert!(sums.iter().enumerate().all(right), "rank {rank}");
    }
}

#[test]
fn exchanges_follow_one_another_and_nobody_waits_inside_nccl() {
    let results = ranks(2, 20.0, Device::Cpu, |stand_in, mut nccl| {
        let mut total = Tensor::from_slice(&[nccl.rank() as i64 + 1; 40]);
        for _ in 0..20 {
            nccl.reduce(&mut total, &[0..20, 20..40]).unwrap();
            nccl.gather(&mut total.view_dtype(Kind::Float), &[0..40, 40..80]).unwrap();
        }
        assert_eq!(nccl.all_gather_bytes(&[nccl.rank() as u8]).unwrap(), [[0], [1]]);
        assert!(stand_in.polls() > 40, "in progress more than once for each operation");
        elements::<i64>(&total).to_vec()
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0][0], 3 << 19, "doubled each time");
}

#[test]
fn an_exchange_waits_for_what_computes_its_sums() {
    let results = ranks(2, 20.0, Device::Cpu, |stand_in, nccl| {
        let rank = nccl.rank();
        let stopper = nccl.mesh.stopper().clone();
        let mut courier = Courier::new(Box::new(nccl), &stopper);
        stand_in.hold(true);
        let sums = Tensor::from_slice(&[-7i64, -7]);
        let (mut travelling, reduced) = (sums.shallow_clone(), sums.shallow_clone());
        let ticket = courier.send(move |c: &mut dyn Collective| c.reduce(&mut travelling, &[0..1, 1..2]));
        std::thread::sleep(Duration::from_millis(60));
        // What was asked for before is only done now.
        { sums }.copy_(&Tensor::from_slice(&[1i64 << rank, 16 << rank]));
        std::thread::sleep(Duration::from_millis(20));
        stand_in.hold(false);
        ticket.wait().unwrap();
        elements::<i64>(&reduced)[rank]
    });
    assert_eq!(results, [1 + 2, 16 + 32]);
}

/// The error of rank 0 where rank 1 does as it is told; and how long it took.
fn trouble(fault: Fault, timeout: f64, device: Device) -> (Error, Duration) {
    let results = ranks(2, timeout, device, |stand_in, mut nccl| {
        let begun = Instant::now();
        if nccl.rank() == 0 {
            stand_in.fault(fault);
        }
        let outcome = nccl.reduce_scatter(&mut [1; 30], &[0..10, 10..30]);
        stand_in.fault(Fault::None);
        // After it nothing else goes through, and nothing is waited for.
        if outcome.is_err() {
            assert!(nccl.reduce(&mut Tensor::from_slice(&[1i64; 30]), &[0..10, 10..30]).is_err());
        }
        (outcome.err(), begun.elapsed())
    });
    let mut results = results.into_iter();
    let (error, took) = results.next().unwrap();
    (error.expect("rank 0 is in trouble"), took)
}

#[test]
fn a_hang_ends_with_the_deadline_and_says_where() {
    for device in PLACES {
        let (error, took) = trouble(Fault::Hangs, 0.4, device);
        let stuck = matches!(error, Error::Stuck { rank: 0, operation: "reduce", bytes: 240, .. });
        assert!(stuck || matches!(error, Error::Lost { peer: 1, .. }), "{error:?}");
        assert!(took < Duration::from_secs(3), "{took:?}");
    }
}

#[test]
fn what_nccl_says_is_passed_on() {
    let (error, took) = trouble(Fault::BreaksLater, 20.0, Device::Cpu);
    let sentence = error.to_string();
    assert!(matches!(error, Error::Nccl { rank: 0, operation: "reduce", bytes: 240, .. }), "{error:?}");
    assert!(sentence.contains("rank 0, reduce") && sentence.contains("network error"), "{sentence}");
    assert!(took < Duration::from_secs(3), "at once, not with the deadline: {took:?}");
    let (error, _) = trouble(Fault::Refuses, 20.0, Device::Cpu);
    assert!(error.to_string().contains("invalid usage: the stand-in was told to refuse"), "{error}");
}

#[test]
fn ranks_out_of_step_do_not_wait_for_ever() {
    let errors = ranks(2, 0.4, Device::Cpu, |_, mut nccl| {
        let length = 30 + nccl.rank();
        nccl.reduce_scatter(&mut vec![1; length], &[0..10, 10..length]).unwrap_err()
    });
    assert!(errors.iter().all(|e| matches!(e, Error::Stuck { .. } | Error::Lost { .. })), "{errors:?}");
    assert!(errors.iter().any(|e| matches!(e, Error::Stuck { .. })), "{errors:?}");
}

#[test]
fn a_peer_that_is_gone_is_named_before_the_deadline() {
    let results = ranks(3, 30.0, Device::Cpu, |_, mut nccl| {
        let begun = Instant::now();
        if nccl.rank() == 2 {
            return None;
        }
        Some((
            nccl.reduce(&mut Tensor::from_slice(&[1i64; 30]), &[0..10, 10..20, 20..30]).unwrap_err(),
            begun.elapsed(),
        ))
    });
    let named = |r: &Option<(Error, Duration)>| matches!(r, Some((Error::Lost { peer: 2, .. }, _)));
    assert!(results.iter().any(named), "{results:?}");
    for (error, took) in results.into_iter().flatten() {
        // Whoever notices first leaves too.
        assert!(matches!(error, Error::Lost { operation: "reduce", bytes: 240, .. }), "{error:?}");
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
}

#[test]
fn whoever_stops_the_generation_ends_a_hang() {
    let results = ranks(2, 30.0, Device::Cpu, |stand_in, mut nccl| {
        let begun = Instant::now();
        let stopper = nccl.stopper.clone();
        if nccl.rank() == 1 {
            // Does not take part until the other was stopped.
            while nccl.mesh.lost().is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            return (None, begun.elapsed());
        }
        let error = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(150));
                stopper.stop();
            });
            nccl.reduce(&mut Tensor::from_slice(&[1i64; 30]), &[0..10, 10..30]).unwrap_err()
        });
        let _ = stand_in;
        (Some(error), begun.elapsed())
    });
    assert!(matches!(results[0].0, Some(Error::Stopped)), "{:?}", results[0]);
    assert!(results.iter().all(|(_, took)| *took < Duration::from_secs(5)));
}

#[test]
fn a_meeting_that_comes_to_nothing_is_an_error() {
    let _turn = stand_in::turn();
    let stand_in = StandIn::open();
    let before = stand_in.alive();
    let meet = |fault: Fault, timeout: f64, change: fn(&mut Membership)| {
        let mut outcomes = each(memberships(2, timeout), |mesh, membership| {
            let mut membership = membership.clone();
            if mesh.rank() == 1 {
                stand_in.fault(fault);
                change(&mut membership);
            }
            let outcome = Nccl::meet(mesh, &membership, &stand_in.libraries(Device::Cpu)).map(drop);
            stand_in.fault(Fault::None);
            outcome
        });
        outcomes.pop().unwrap().unwrap_err()
    };
    let error = meet(Fault::NeverReady, 0.3, |_| {});
    assert!(matches!(error, Error::Stuck { rank: 1, operation: "meeting", .. } | Error::Lost { .. }), "{error:?}");
    let error = meet(Fault::Refuses, 5.0, |_| {});
    assert!(matches!(&error, Error::Nccl { rank: 1, problem, .. } if problem.contains("refuse")), "{error:?}");
    let error = meet(Fault::None, 5.0, |membership| membership.key[0] ^= 1);
    assert!(matches!(error, Error::Protocol { peer: 0, .. }), "{error:?}");
    assert_eq!(stand_in.alive(), before);
}

#[test]
fn a_machine_without_nccl_says_so() {
    let error = Libraries::open(Device::Cpu).map(drop).unwrap_err();
    assert!(error.is_lasting() && error.to_string().contains("cluster.transport = \"tcp\""), "{error}");
    drop(mesh(1));
}
