//! Copies of checkpoints: whole or not at all, the newest brought back, damaged ones passed over.

use super::super::state::tests::write;
use super::*;
use std::sync::mpsc::channel;

/// A run's directory with checkpoints after `steps`, and where it is copied to.
fn run(steps: &[u64]) -> (tempfile::TempDir, PathBuf, String) {
    let home = tempfile::tempdir().unwrap();
    let run_dir = home.path().join("tiny-001");
    for &step in steps {
        let directory = manifest::directory(&run_dir, step);
        write(&directory, 2);
        let mut manifest = Manifest::read(&directory).unwrap();
        (manifest.step, manifest.cursor.step) = (step, step);
        std::fs::write(directory.join(MANIFEST), manifest.to_json()).unwrap();
    }
    std::fs::write(run_dir.join("config.toml"), "[model]\n").unwrap();
    let url = format!("file://{}/copies", home.path().display());
    (home, run_dir, url)
}

/// Copies the checkpoints after `steps`, one after another, keeping `keep`; what was told of each.
fn copy_all(run_dir: &Path, url: &str, steps: &[u64], keep: usize) -> Vec<Result<f64, String>> {
    let (tell, told) = channel();
    let snapshot: Snapshot = Box::new(|to| std::fs::write(to, "the ledger").map_err(|e| e.to_string()));
    let courier = Courier::spawn(url, run_dir, keep, snapshot, move |_, copied| tell.send(copied).unwrap()).unwrap();
    for &step in steps {
        courier.take(step).unwrap();
        assert!(courier.wait(Duration::from_secs(20)));
    }
    told.try_iter().collect()
}

fn same(a: &Path, b: &Path) {
    let names = |d: &Path| {
        let mut names: Vec<_> = std::fs::read_dir(d).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(a), names(b));
    for name in names(a) {
        assert_eq!(std::fs::read(a.join(&name)).unwrap(), std::fs::read(b.join(&name)).unwrap(), "{name:?}");
    }
}

#[test]
fn a_run_comes_back_from_its_newest_copy_and_old_copies_go() {
    let (home, run_dir, url) = run(&[2, 4, 6]);
    assert!(copy_all(&run_dir, &url, &[2, 4, 6], 2).iter().all(Result::is_ok));
    assert_eq!(newest_run(&url, "tiny").unwrap(), Some(format!("{url}/tiny-001")));
    assert_eq!(newest_run(&url, "other").unwrap(), None);
    let store = Store::open(&format!("{url}/tiny-001")).unwrap();
    assert_eq!(copies(&store).unwrap().keys().copied().collect::<Vec<_>>(), [4, 6]);
    let back = home.path().join("elsewhere/tiny-001");
    std::fs::create_dir_all(back.parent().unwrap()).unwrap();
    assert_eq!(bring(&format!("{url}/tiny-001"), &back).unwrap(), (6, vec![]));
    same(&manifest::directory(&run_dir, 6), &manifest::directory(&back, 6));
    assert_eq!(std::fs::read(back.join("ledger.sqlite")).unwrap(), b"the ledger");
    assert_eq!(std::fs::read(back.join("config.toml")).unwrap(), b"[model]\n");
    assert_eq!(std::fs::read_dir(back.parent().unwrap()).unwrap().count(), 1, "nothing half-done is left");
}

#[test]
fn a_checkpoint_that_was_copied_is_not_copied_again_and_the_last_one_is_made_up_for() {
    let (home, run_dir, url) = run(&[2]);
    let snapshot = || -> Snapshot { Box::new(|to| std::fs::write(to, "the ledger").map_err(|e| e.to_string())) };
    copy_last(&url, &run_dir, 2, 1, snapshot()).unwrap();
    assert_eq!(bring(&format!("{url}/tiny-001"), &home.path().join("back")).unwrap().0, 2);
    // A store that takes nothing any more is not asked to.
    let read_only = |_: &Path| Err("nothing is to be copied".to_owned());
    copy_last(&url, &run_dir, 2, 1, Box::new(read_only)).unwrap();
}

#[test]
fn two_runs_of_one_name_never_mix() {
    let (home, run_dir, url) = run(&[2]);
    assert!(claim(&url, &run_dir).unwrap());
    assert!(copy_all(&run_dir, &url, &[2], 2).iter().all(Result::is_ok));
    assert!(claim(&url, &run_dir).unwrap(), "its own");
    let other = home.path().join("another-machine/tiny-001");
    std::fs::create_dir_all(&other).unwrap();
    assert!(!claim(&url, &other).unwrap());
    // Brought back, it is the same run.
    std::fs::remove_dir_all(&other).unwrap();
    bring(&format!("{url}/tiny-001"), &other).unwrap();
    assert!(claim(&url, &other).unwrap());
}

#[test]
fn what_rotted_on_this_disk_is_no_copy_and_a_better_one_replaces_a_bad_one() {
    let (home, run_dir, url) = run(&[2, 4]);
    assert!(copy_all(&run_dir, &url, &[2], 2)[0].is_ok());
    let directory = manifest::directory(&run_dir, 4);
    let name = Manifest::read(&directory).unwrap().files[0].name.clone();
    let good = std::fs::read(directory.join(&name)).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 16;
    std::fs::write(directory.join(&name), &bad).unwrap();
    let told = copy_all(&run_dir, &url, &[4], 1);
    assert!(told[0].as_ref().unwrap_err().contains(&name), "{told:?}");
    assert_eq!(bring(&format!("{url}/tiny-001"), &home.path().join("back")).unwrap().0, 2, "the older one is kept");
    // Another attempt wrote the same step anew: its manifest takes the place of the one there.
    std::fs::write(directory.join(&name), &good).unwrap();
    assert!(copy_all(&run_dir, &url, &[4], 1)[0].is_ok());
    let mut manifest = Manifest::read(&directory).unwrap();
    manifest.writer.attempt += 1;
    std::fs::write(directory.join(MANIFEST), manifest.to_json()).unwrap();
    assert!(copy_all(&run_dir, &url, &[4], 1)[0].is_ok());
    bring(&format!("{url}/tiny-001"), &home.path().join("again")).unwrap();
    same(&directory, &manifest::directory(&home.path().join("again"), 4));
}

#[test]
fn a_file_deleted_while_it_waits_is_copied_all_the_same() {
    let (home, run_dir, url) = run(&[2]);
    let hold = Arc::new(Mutex::new(()));
    let (held, (tell, told)) = (hold.lock().unwrap(), channel());
    let waits = hold.clone();
    let snapshot: Snapshot = Box::new(move |to| {
        drop(waits.lock().unwrap());
        std::fs::write(to, "x").map_err(|e| e.to_string())
    });
    let courier = Courier::spawn(&url, &run_dir, 1, snapshot, move |_, copied| tell.send(copied).unwrap()).unwrap();
    courier.take(2).unwrap();
    std::fs::remove_dir_all(run_dir.join("checkpoints")).unwrap();
    assert!(!courier.wait(Duration::from_millis(50)));
    drop(held);
    assert!(courier.wait(Duration::from_secs(20)));
    assert!(told.recv().unwrap().is_ok());
    assert_eq!(bring(&format!("{url}/tiny-001"), &home.path().join("back")).unwrap().0, 2);
}

#[test]
fn what_is_damaged_or_half_there_is_passed_over_by_name() {
    let (home, run_dir, url) = run(&[2, 4, 6]);
    assert!(copy_all(&run_dir, &url, &[2, 4, 6], 3).iter().all(Result::is_ok));
    let copies = home.path().join("copies/tiny-001/checkpoints");
    // After 6: no manifest, as where the machine went away while copying. After 4: a bit is wrong.
    std::fs::remove_file(copies.join("step-00000006").join(MANIFEST)).unwrap();
    let state = Manifest::read(&manifest::directory(&run_dir, 4)).unwrap().files[0].name.clone();
    let path = copies.join("step-00000004").join(&state);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let (step, problems) = bring(&format!("{url}/tiny-001"), &home.path().join("back")).unwrap();
    assert_eq!(step, 2);
    assert!(problems.len() == 1 && problems[0].contains("step 4") && problems[0].contains(&state), "{problems:?}");
    for step in [2, 4] {
        for entry in std::fs::read_dir(copies.join(format!("step-{step:08}"))).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with("ledger") {
                std::fs::write(path, "another").unwrap();
            }
        }
    }
    let again = home.path().join("again");
    assert!(bring(&format!("{url}/tiny-001"), &again).unwrap_err().to_string().contains("step 2"));
    assert!(!again.exists());
    let nothing = bring(&format!("{url}/tiny-009"), &again).unwrap_err().to_string();
    assert!(nothing.contains("holds no checkpoint of a run"), "{nothing}");
}
