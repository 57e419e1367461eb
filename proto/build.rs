//! Compiles the .proto files with protox: no protoc to install.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["unisono/v1/common.proto", "unisono/v1/training.proto", "unisono/v1/monitor.proto"];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["."])?;
    let mut build = tonic_prost_build::configure().bytes(".");
    // What a ledger entry holds is also shown as JSON, under the names of its fields.
    for message in [
        "RunStarted",
        "StepCommitted",
        "Evaluated",
        "Memory",
        "GpuMemory",
        "CheckpointCommitted",
        "Membership",
        "Member",
        "Fingerprint",
        "RunDone",
        "Failure",
        "WorkerLost",
        "Warning",
        "RunStopped",
        "Quarantined",
    ] {
        build = build.type_attribute(format!("unisono.v1.{message}"), "#[derive(serde::Serialize)]");
    }
    build
        .field_attribute("unisono.v1.Failure.phase", "#[serde(serialize_with = \"crate::event::phase\")]")
        // Between worker and coordinator; people have the message.
        .field_attribute("unisono.v1.Failure.norm", "#[serde(skip)]")
        .field_attribute("unisono.v1.Memory.gpu", "#[serde(skip_serializing_if = \"Option::is_none\")]")
        .field_attribute("unisono.v1.WorkerLost.failure", "#[serde(flatten)]")
        .compile_fds(descriptors)?;
    Ok(())
}
