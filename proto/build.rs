//! Compiles the .proto files with protox: no protoc to install.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["unisono/v1/common.proto", "unisono/v1/training.proto", "unisono/v1/monitor.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
