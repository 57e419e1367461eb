//! The corpus of the fuzz targets, on stable Rust: what once was interesting stays harmless, and so does what a few random
//! changes make of it. `UNISONO_MUTATIONS` sets how many are made of each input (default 40), `UNISONO_SEED` which.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use unisono::checkpoint::{manifest::Manifest, state};
use unisono::data::untrusted;
use unisono_configs::run::RunConfig;

/// The inputs of one target; at least one.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    let inputs: Vec<_> = files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    inputs
}

/// Every input, and what is made of it, ends in time and without a panic.
fn replay(target: &str, parse: impl Fn(&[u8])) {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (mutations, seed) = (number("UNISONO_MUTATIONS", 40), number("UNISONO_SEED", 1));
    let inputs = corpus(target);
    for (path, input) in &inputs {
        for mutation in 0..=mutations {
            let mut luck = lucky(seed.wrapping_mul(1_000_003).wrapping_add(mutation));
            let mut bytes = input.clone();
            if mutation > 0 {
                let other = &inputs[luck(inputs.len() as u64) as usize].1;
                (0..=luck(4)).for_each(|_| change(&mut bytes, other, &mut luck));
            }
            let begun = Instant::now();
            parse(&bytes);
            let took = begun.elapsed();
            assert!(
                took < Duration::from_secs(20),
                "{}, mutation {mutation} of seed {seed} took {took:?}",
                path.display()
            );
        }
    }
}

fn lucky(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

/// One change: a bit, a byte, a part that goes, comes twice or comes from elsewhere.
fn change(bytes: &mut Vec<u8>, other: &[u8], luck: &mut impl FnMut(u64) -> u64) {
    const WORDS: [&str; 12] =
        ["{{", "}}", "{%", "\"", "[", "]", "99999999999999999999", "-1", "null", "\\ud800", "1e999", "\u{0}"];
    let place = |length: usize, luck: &mut dyn FnMut(u64) -> u64| luck(length as u64 + 1) as usize;
    let at = place(bytes.len(), luck);
    let to = at + place(bytes.len() - at, luck);
    match luck(6) {
        0 if at < bytes.len() => bytes[at] ^= 1 << luck(8),
        1 if at < bytes.len() => bytes[at] = luck(256) as u8,
        2 => drop(bytes.drain(at..to)),
        3 => {
            let part = bytes[at..to].to_vec();
            bytes.splice(at..at, part);
        }
        4 => {
            let begin = place(other.len(), luck);
            let end = begin + place(other.len() - begin, luck);
            bytes.splice(at..at, other[begin..end].iter().copied());
        }
        _ => drop(bytes.splice(at..at, WORDS[luck(WORDS.len() as u64) as usize].bytes())),
    }
}

#[test]
fn safetensors() {
    replay("safetensors", |data| {
        if let Some((length, header)) = data.split_at_checked(4) {
            let length = u32::from_le_bytes(length.try_into().unwrap());
            drop(state::tensors_within(header, u64::from(length)));
        }
    });
}

#[test]
fn manifest() {
    replay("manifest", |data| drop(Manifest::parse(data, Path::new("MANIFEST.json"))));
}

#[test]
fn row() {
    replay("row", |data| drop(untrusted::row(data)));
}

#[test]
fn template() {
    replay("template", |data| drop(untrusted::template(data)));
}

#[test]
fn config() {
    replay("config", |data| {
        if let Ok(text) = std::str::from_utf8(data) {
            if let Ok(config) = RunConfig::parse("config.toml", text, Path::new("")) {
                assert_eq!(RunConfig::parse("config.toml", &config.to_toml(), Path::new("")).unwrap(), config);
            }
        }
    });
}
