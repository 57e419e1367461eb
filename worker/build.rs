//! Binds the binaries to the libtorch they were built with, so that they run without LD_LIBRARY_PATH.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let libtorch = std::env::var("LIBTORCH").unwrap_or_default();
    // The bindings to libtorch would fail later and in a way that is hard to read.
    if !libtorch.is_empty() && !Path::new(&libtorch).join("lib").is_dir() {
        println!("cargo::error=libtorch is not at {libtorch}: run `make setup`, which finds or installs it, then build again");
        std::process::exit(1);
    }
    // The link in the checkout may change or go; the directory behind it is what the binary should remember.
    let root = std::fs::canonicalize(&libtorch).unwrap_or_else(|_| Path::new(&libtorch).to_path_buf());
    println!("cargo:rustc-env=UNISONO_LIBTORCH={}", version(&root));
    if !libtorch.is_empty() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", root.join("lib").display());
    }
}

/// As the wheel (version.py) or the zip (build-version) of libtorch says; else the version that tch asks for.
fn version(root: &Path) -> String {
    let wheel = std::fs::read_to_string(root.join("version.py")).unwrap_or_default();
    let line = wheel.lines().find_map(|line| line.strip_prefix("__version__"));
    let quoted = line.and_then(|line| line.split(['\'', '"']).nth(1).map(str::to_owned));
    let zip = || std::fs::read_to_string(root.join("build-version")).ok().map(|text| text.trim().to_owned());
    quoted.or_else(zip).unwrap_or_else(|| "2.11.0".to_owned())
}
