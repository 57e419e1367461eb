//! Binds the binaries to the libtorch they were built with, so that they run without LD_LIBRARY_PATH.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let Ok(libtorch) = std::env::var("LIBTORCH") else { return };
    // The bindings to libtorch would fail later and in a way that is hard to read.
    if !Path::new(&libtorch).join("lib").is_dir() {
        println!("cargo::error=libtorch is not at {libtorch}: run `make setup`, which finds or installs it, then build again");
        std::process::exit(1);
    }
    // The link in the checkout may change or go; the directory behind it is what the binary should remember.
    let root = std::fs::canonicalize(&libtorch).unwrap_or_else(|_| Path::new(&libtorch).to_path_buf());
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", root.join("lib").display());
}
