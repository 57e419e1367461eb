//! No torn checkpoint ever loads: every file of a real one, the manifest too, is cut, loses a bit or is gone; each time that
//! file is named, the checkpoint is set aside, and the one before it is taken.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use unisono::checkpoint::disk::Local;
use unisono::checkpoint::manifest;
use unisono::checkpoint::newest::newest;
use unisono_configs::model::{Layout, ModelSpec};
use unisono_tests::train::Train;
use unisono_tests::{chronicle, fixture};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let to = to.join(entry.file_name().unwrap());
        if entry.is_dir() {
            copy(&entry, &to);
        } else {
            fs::copy(&entry, &to).unwrap();
        }
    }
}

/// What is done to a file, and what it is called.
type Damage = (String, Box<dyn Fn(&Path)>);

/// What can happen to a file.
fn damages(length: usize) -> Vec<Damage> {
    let mut all: Vec<Damage> = vec![("gone".into(), Box::new(|path| fs::remove_file(path).unwrap()))];
    for end in [0, 1, 7, 8, 9, length / 3, length / 2, length - 1] {
        all.push((format!("cut at {end}"), Box::new(move |path| cut(path, end))));
    }
    for place in (0..48).map(|i| i * (length - 1) / 47) {
        let bit = place % 8;
        all.push((format!("bit {bit} of byte {place}"), Box::new(move |path| flip(path, place, bit))));
    }
    all
}

fn cut(path: &Path, end: usize) {
    let content = fs::read(path).unwrap();
    fs::write(path, &content[..end]).unwrap();
}

fn flip(path: &Path, place: usize, bit: usize) {
    let mut content = fs::read(path).unwrap();
    content[place] ^= 1 << bit;
    fs::write(path, content).unwrap();
}

#[test]
fn every_damage_to_every_file_is_found_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let micro = fixture::of(fixture::MICRO);
    let train = Train::new(&micro.model, &micro.data, dir.path()).workers(2).set("train.steps", 4);
    let ended = train.set("train.global_batch_size", 8).set("checkpoint.every", 2).succeed();
    let layout = Layout::new(&ModelSpec::read(&micro.model).unwrap());
    let newest_of = |run_dir: &Path| newest(&Local, run_dir, 9, &layout).unwrap();
    let (whole, damaged) = newest_of(&ended.run_dir);
    assert_eq!((whole.unwrap().manifest.step, damaged.len()), (4, 0));

    let directory = manifest::directory(&ended.run_dir, 4);
    let files: Vec<PathBuf> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 4, "two shards, the rows and the manifest: {files:?}");
    let mut tried = 0;
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        for (what, damage) in damages(fs::metadata(&file).unwrap().len() as usize) {
            let run = tempfile::tempdir().unwrap();
            copy(&ended.run_dir.join("checkpoints"), &run.path().join("checkpoints"));
            damage(&manifest::directory(run.path(), 4).join(name));
            let (found, damaged) = newest_of(run.path());
            let step = found.map(|state| state.manifest.step);
            assert_eq!(step, Some(2), "{name}, {what}");
            if name == manifest::MANIFEST && what == "gone" {
                // Without a manifest there was never a checkpoint.
                assert_eq!(damaged, []);
                continue;
            }
            assert_eq!(damaged.len(), 1, "{name}, {what}");
            assert!(damaged[0].reason.contains(name), "{name}, {what}: {}", damaged[0].reason);
            assert_eq!(newest_of(run.path()).1, [], "what was set aside does not count again");
            tried += 1;
        }
    }
    assert!(tried > 200, "{tried}");
    chronicle::note("torn", serde_json::json!({"damages": tried}));
}
