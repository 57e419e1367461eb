//! Images between processes, and what a store keeps of them.

use super::exchange::*;
use super::*;
use crate::collective::tcp::Stopper;
use std::time::Duration;

fn name(step: u64, rank: u32) -> Name {
    Name { timeline: [3; 32], step, rank, world: 2 }
}

fn image(step: u64, rank: u32) -> Image {
    let bytes: Vec<u8> = (0..3_000_000u64).map(|i| (i * 31 + step * 7 + u64::from(rank)) as u8).collect();
    Image { name: name(step, rank), hash: *blake3::hash(&bytes).as_bytes(), bytes }
}

fn circle(rank: usize, generation: u64) -> Circle {
    Circle::new(&[5; 32], 1, generation, rank, Duration::from_secs(20))
}

/// Rank 1's end, in generation 4.
fn other() -> Exchange {
    let other = Exchange::open("127.0.0.1").unwrap();
    other.enter(circle(1, 4));
    other.store.begin(None, Arc::default(), 13_000_000);
    other
}

#[test]
fn what_is_handed_over_comes_back_to_the_bit() {
    let (other, stopper) = (other(), Stopper::default());
    let first = image(10, 0);
    let send = |image: &Image| put(&circle(0, 4), &stopper, &other.address, 1, image);
    send(&first).unwrap();
    send(&first).unwrap();
    assert_eq!(other.store.held(), [first.held()]);
    let mine = Store::default();
    let back = get(&circle(2, 4), &stopper, &other.address, 1, &first.held(), &mine).unwrap();
    assert_eq!((back.name, back.bytes == first.bytes), (first.name, true));
    let unknown = get(&circle(2, 4), &stopper, &other.address, 1, &image(20, 0).held(), &mine).unwrap_err();
    assert!(unknown.to_string().contains("rank 1") && unknown.to_string().contains("not hold"), "{unknown}");
}

#[test]
fn two_of_each_owner_are_kept_and_older_ones_go_when_a_newer_one_is_whole() {
    let (other, stopper) = (other(), Stopper::default());
    let verdicts = Arc::new(Verdicts::default());
    other.store.begin(None, verdicts.clone(), 13_000_000);
    let send = |image: &Image| put(&circle(0, 4), &stopper, &other.address, 1, image);
    send(&image(10, 0)).unwrap();
    send(&image(20, 0)).unwrap();
    let full = send(&image(30, 0)).unwrap_err().to_string();
    assert!(full.contains("no room"), "{full}");
    let steps = || other.store.held().iter().map(|h| h.step).collect::<Vec<_>>();
    assert_eq!(steps(), [10, 20]);
    verdicts.retain(20);
    send(&image(30, 0)).unwrap();
    assert_eq!(steps(), [20, 30]);
    // A generation that goes on after step 20 has no use for the rest, one that goes on elsewhere for none.
    other.store.begin(Some(20), Arc::default(), 13_000_000);
    assert_eq!(steps(), [20]);
    other.store.begin(None, Arc::default(), 1000);
    assert_eq!(steps(), [0u64; 0]);
    assert!(send(&image(40, 0)).is_err(), "larger than any neighbour's");
}

#[test]
fn a_snapshot_that_cannot_be_whole_makes_room_for_the_next() {
    let (other, stopper) = (other(), Stopper::default());
    let verdicts = Arc::new(Verdicts::default());
    other.store.begin(None, verdicts.clone(), 13_000_000);
    let send = |image: &Image| put(&circle(0, 4), &stopper, &other.address, 1, image);
    [10, 20].iter().for_each(|&step| send(&image(step, 0)).unwrap());
    verdicts.retain(10);
    assert!(send(&image(30, 0)).is_err());
    verdicts.forget(20);
    send(&image(30, 0)).unwrap();
    let steps = || other.store.held().iter().map(|h| h.step).collect::<Vec<_>>();
    assert_eq!(steps(), [10, 30]);
    // It was forgotten before, in whatever order that was heard.
    verdicts.retain(30);
    assert_eq!(steps(), [30]);
}

#[test]
fn images_cut_for_an_earlier_generation_go_once_those_of_this_one_are_whole() {
    let (other, stopper) = (other(), Stopper::default());
    let send = |image: &Image| put(&circle(0, 4), &stopper, &other.address, 1, image);
    let of_three = |rank| Image { name: Name { world: 3, ..name(20, rank) }, ..image(20, rank) };
    [of_three(0), of_three(1)].iter().for_each(|image| send(image).unwrap());
    send(&image(20, 1)).unwrap();
    let verdicts = Arc::new(Verdicts::default());
    other.store.begin(Some(20), verdicts.clone(), 13_000_000);
    assert_eq!(other.store.bytes_of(20), 9_000_000);
    // One comes anew, one is here already; more would be beyond what is planned.
    send(&image(20, 0)).unwrap();
    send(&image(20, 1)).unwrap();
    assert!(send(&image(30, 0)).is_err());
    let cuts = || other.store.held().iter().map(|h| (h.rank, h.world)).collect::<Vec<_>>();
    assert_eq!(cuts(), [(0, 3), (1, 3), (1, 2), (0, 2)]);
    verdicts.retain(20);
    assert_eq!(cuts(), [(1, 2), (0, 2)]);
    send(&image(30, 0)).unwrap();
}

#[test]
fn strangers_and_wrong_copies_are_turned_away() {
    let (other, stopper) = (other(), Stopper::default());
    assert!(put(&circle(0, 3), &stopper, &other.address, 1, &image(10, 0)).is_err(), "of the generation before");
    let wrong = Image { hash: [0; 32], ..image(10, 0) };
    let told = put(&circle(0, 4), &stopper, &other.address, 1, &wrong).unwrap_err().to_string();
    assert!(told.contains("damaged"), "{told}");
    assert_eq!(other.store.held(), []);
    // A copy that has rotted in memory is no source, and is forgotten once that is found.
    let rotten = Image { bytes: image(20, 0).bytes.into_iter().map(|b| b ^ 1).collect(), ..image(10, 0) };
    let held = other.store.insert(other.store.turn(), rotten).held();
    let told = get(&circle(0, 4), &stopper, &other.address, 1, &held, &Store::default()).unwrap_err().to_string();
    assert!(told.contains("rank 1") && told.contains("damaged"), "{told}");
    let begun = std::time::Instant::now();
    while !other.store.held().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it is still held");
        std::thread::sleep(Duration::from_millis(5));
    }
}
