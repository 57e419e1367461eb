//! What a worker computes on. The CUDA part of libtorch is opened on demand, so one binary serves machines with and without
//! GPUs, and a machine without one needs none of its libraries.
#![allow(unsafe_code)]

use crate::library::{self, functions, Library};
use crate::memory::Bytes;
use crate::ops::{kernels, switches};
use cudarc::driver::{result, sys};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use tch::{Cuda, Device};

/// Why a device cannot be used. Each is one sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cluster.device = \"{0}\" is no device that this worker knows; set \"cpu\" or \"cuda\"")]
    Unknown(String),
    #[error("cluster.device = \"cuda\", but the CUDA part of libtorch cannot be opened ({0}); install torch 2.11.0 with CUDA and set LIBTORCH to it, or set cluster.device = \"cpu\"")]
    NoLibrary(String),
    #[error("cluster.device = \"cuda\", but NVIDIA's driver (libcuda.so.1) cannot be opened; install the driver, in a container run it with --gpus all, or set cluster.device = \"cpu\"")]
    NoDriver,
    #[error("NVIDIA's driver on this machine is for CUDA {found}, and libtorch 2.11.0 needs CUDA {NEEDED}: install driver 580 or newer, or set cluster.device = \"cpu\"", found = Version(*.0))]
    OldDriver(i32),
    #[error("cluster.device = \"cuda\", but CUDA finds no usable GPU{hidden}; see that nvidia-smi lists one, or set cluster.device = \"cpu\"", hidden = hidden())]
    NoGpu,
    #[error("GPU {index} cannot be used ({reason}); see that nvidia-smi shows it well and that no other process has it for itself, or set cluster.device = \"cpu\"")]
    Unusable { index: usize, reason: String },
    #[error("GPU {index} ({name}) is of compute capability {major}.{minor}, and bf16 needs 8.0 or newer (Ampere): use another GPU, or set cluster.device = \"cpu\"")]
    OldGpu { index: usize, name: String, major: i32, minor: i32 },
    #[error("this worker sees GPUs of several kinds ({0}), whose results differ: choose those of one kind with CUDA_VISIBLE_DEVICES")]
    Mixed(String),
    #[error("GPU {index} has {free} of {total} free{holders}: end what holds it, or choose another GPU with CUDA_VISIBLE_DEVICES", free = Bytes(*.free), total = Bytes(*.total))]
    Full { index: usize, free: u64, total: u64, holders: String },
    #[error(transparent)]
    Kernels(#[from] kernels::Error),
    #[error(transparent)]
    Switches(#[from] switches::Missing),
}

/// The CUDA that libtorch was built for.
const NEEDED: Version = Version(13_000);

/// As the driver counts: 13020 is 13.2.
#[derive(PartialEq, PartialOrd)]
struct Version(i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

fn hidden() -> String {
    match std::env::var("CUDA_VISIBLE_DEVICES") {
        Ok(devices) => format!(" (CUDA_VISIBLE_DEVICES is \"{devices}\")"),
        Err(_) => String::new(),
    }
}

/// The device `name` for the worker that is number `local` (from 0) on its machine.
pub fn open(name: &str, local: usize) -> Result<Device, Error> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "cuda" => open_gpu(local),
        other => Err(Error::Unknown(other.to_owned())),
    }
}

fn open_gpu(local: usize) -> Result<Device, Error> {
    load_cuda()?;
    Library::open("libcuda.so.1").map_err(|_| Error::NoDriver)?;
    let version = driver_version().ok_or(Error::NoDriver)?;
    if Version(version) < NEEDED {
        return Err(Error::OldDriver(version));
    }
    let count = Cuda::device_count();
    if count <= 0 || !Cuda::is_available() {
        return Err(Error::NoGpu);
    }
    let kinds = kinds().map_err(|reason| Error::Unusable { index: 0, reason: reason.to_string() })?;
    if kinds.len() > 1 {
        return Err(Error::Mixed(kinds.join(", ")));
    }
    let index = local % count as usize;
    if local as i64 >= count {
        tracing::warn!(local, count, "workers share a GPU");
    }
    let gpu = Gpu::describe(index).map_err(|reason| Error::Unusable { index, reason: reason.to_string() })?;
    if gpu.major < 8 {
        let Gpu { name, major, minor, .. } = gpu;
        return Err(Error::OldGpu { index, name, major, minor });
    }
    // libtorch's own context takes about half of this. A worker that comes again holds what it needs already, kept for the
    // next tensors.
    if gpu.free < 1 << 30 && !kernels::is_loaded(index) {
        return Err(Error::Full { index, free: gpu.free, total: gpu.total, holders: holders() });
    }
    switches::make_deterministic()?;
    kernels::load(index)?;
    tracing::info!(index, name = gpu.name, free = gpu.free, driver = %Version(version), "a GPU");
    Ok(Device::Cuda(index))
}

/// Registers libtorch's CUDA backend, which happens as its library is loaded: the one beside the libtorch that runs.
fn load_cuda() -> Result<(), Error> {
    let beside = library::loaded_from("libtorch_cpu.so").map(|torch| torch.with_file_name("libtorch_cuda.so"));
    let found = beside.filter(|path| path.exists()).unwrap_or_else(|| "libtorch_cuda.so".into());
    Library::open(found).map(drop).map_err(Error::NoLibrary)
}

/// The newest CUDA that the driver runs.
fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: the driver's library is open, and the number is this frame's.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().ok().map(|()| version)
}

/// What decides the bits of GPUs' arithmetic beside libtorch and this program: their kind, and the versions of driver and
/// cuBLAS. Empty where there are none. Makes no context.
pub fn numerics() -> String {
    if Library::open("libcuda.so.1").is_err() {
        return String::new();
    }
    let kinds = result::init().and_then(|()| kinds()).unwrap_or_default();
    match (kinds.is_empty(), driver_version()) {
        (false, Some(driver)) => shown(&kinds, driver, cublas().as_deref()),
        _ => String::new(),
    }
}

fn shown(kinds: &[String], driver: i32, cublas: Option<&str>) -> String {
    let cublas = cublas.map_or(String::new(), |version| format!(", cuBLAS {version}"));
    format!("{}, CUDA driver {}{cublas}", kinds.join(" and "), Version(driver))
}

/// Model and compute capability of all GPUs that this process may use, each once.
fn kinds() -> Result<Vec<String>, result::DriverError> {
    let mut kinds = Vec::new();
    for index in 0..result::device::get_count()? {
        let (name, major, minor) = kind(result::device::get(index)?)?;
        kinds.push(format!("{name} ({major}.{minor})"));
    }
    kinds.sort();
    kinds.dedup();
    Ok(kinds)
}

/// Name and compute capability.
fn kind(device: sys::CUdevice) -> Result<(String, i32, i32), result::DriverError> {
    // SAFETY: the device is the driver's own.
    let attribute = |which| unsafe { result::device::get_attribute(device, which) };
    let major = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok((result::device::get_name(device)?, major, minor))
}

functions! {
    Cublas {
        property = "cublasGetProperty": fn(i32, *mut i32) -> u32;
    }
}

/// The version of the cuBLAS that libtorch will open.
fn cublas() -> Option<String> {
    let dirs = library::beside_libtorch("cu13").into_iter().chain([std::path::PathBuf::new()]);
    let library = dirs.into_iter().find_map(|dir| Library::open_apart(dir.join("libcublas.so.13")).ok())?;
    let cublas = Cublas::of(library).ok()?;
    let number = |which| {
        let mut value = 0;
        // SAFETY: writes one number, of this frame.
        let code = unsafe { (cublas.property)(which, &mut value) };
        (code == 0).then_some(value)
    };
    Some(format!("{}.{}.{}", number(0)?, number(1)?, number(2)?))
}

/// A GPU as its driver describes it.
#[derive(Debug, Clone)]
pub struct Gpu {
    pub name: String,
    pub major: i32,
    pub minor: i32,
    pub free: u64,
    pub total: u64,
}

impl Gpu {
    /// Makes the GPU's context, which libtorch uses too, this thread's own.
    pub fn describe(index: usize) -> Result<Gpu, result::DriverError> {
        result::init()?;
        let device = result::device::get(index as i32)?;
        let (name, major, minor) = kind(device)?;
        // SAFETY: the device is the driver's own; the context is kept for good.
        let context = unsafe { result::primary_ctx::retain(device) }?;
        // SAFETY: a live context.
        unsafe { result::ctx::set_current(context) }?;
        let (free, total) = result::mem_get_info()?;
        Ok(Gpu { name, major, minor, free: free as u64, total: total as u64 })
    }
}

/// What tells a GPU from all others in the world.
pub fn identity(device: Device) -> Result<Vec<u8>, Error> {
    let Device::Cuda(index) = device else { return Err(Error::NoGpu) };
    let found = result::device::get(index as i32).and_then(result::device::get_uuid);
    let uuid = found.map_err(|reason| Error::Unusable { index, reason: reason.to_string() })?;
    Ok(uuid.bytes.iter().map(|byte| *byte as u8).collect())
}

/// Bytes that GPUs had free when this process first asked, before it took any.
static FREE: OnceLock<u64> = OnceLock::new();

/// Bytes that a GPU had free when this process first asked, before it took any: what libtorch keeps of an earlier generation
/// serves the next one. None on the host.
pub fn free(device: Device) -> Result<Option<u64>, Error> {
    let Device::Cuda(index) = device else { return Ok(None) };
    if let Some(known) = FREE.get() {
        return Ok(Some(*known));
    }
    let gpu = Gpu::describe(index).map_err(|reason| Error::Unusable { index, reason: reason.to_string() })?;
    Ok(Some(*FREE.get_or_init(|| gpu.free)))
}

/// The most bytes that this has seen taken since [`free`] first asked, by this process and by others that share the GPU.
/// libtorch keeps what it has taken, so a look after a step sees what the step needed. None on the host.
pub fn taken(device: Device) -> Option<u64> {
    static MOST: AtomicU64 = AtomicU64::new(0);
    let (Device::Cuda(_), Some(before)) = (device, FREE.get()) else { return None };
    // The context is this thread's since it computes.
    let (now, _) = result::mem_get_info().ok()?;
    let taken = before.saturating_sub(now as u64);
    Some(MOST.fetch_max(taken, Ordering::Relaxed).max(taken))
}

/// Bytes that each of `workers` on this machine has free on its GPU, if all begin now and the fullest is shared by most; none
/// where there is no GPU.
pub fn free_anywhere(workers: usize) -> Option<u64> {
    Library::open("libcuda.so.1").ok()?;
    result::init().ok()?;
    let count = result::device::get_count().ok()? as usize;
    let least = (0..count).filter_map(|index| Some(Gpu::describe(index).ok()?.free)).min()?;
    Some(least / workers.div_ceil(count).max(1) as u64)
}

/// Who holds memory of GPUs, as nvidia-smi tells; empty where it tells nothing.
fn holders() -> String {
    let query = ["--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.is_empty() {
        true => String::new(),
        false => format!(" (nvidia-smi lists {})", lines.join("; ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_one_sentence_with_a_remedy() {
        assert_eq!(open("cpu", 3).unwrap(), Device::Cpu);
        assert!(open("tpu", 0).unwrap_err().to_string().contains("cluster.device = \"tpu\""));
        if let Err(error) = open("cuda", 0) {
            assert!(error.to_string().contains("set cluster.device = \"cpu\""), "{error}");
        }
    }

    #[test]
    fn what_does_not_fit_says_what_would() {
        let old = Error::OldDriver(12_080).to_string();
        assert!(old.contains("CUDA 12.8") && old.contains("CUDA 13.0") && old.contains("580"), "{old}");
        let holders = " (nvidia-smi lists 77, python3, 140000 MiB)".to_owned();
        let full = Error::Full { index: 1, free: 5 << 20, total: 141 << 30, holders }.to_string();
        assert!(full.contains("GPU 1 has 5 MB of 151.40 GB free (nvidia-smi lists 77, python3"), "{full}");
        let kinds = ["NVIDIA H100 80GB HBM3 (9.0)".to_owned(), "NVIDIA H200 (9.0)".to_owned()];
        assert_eq!(shown(&kinds[1..], 13_000, Some("13.1.0")), "NVIDIA H200 (9.0), CUDA driver 13.0, cuBLAS 13.1.0");
        assert_eq!(shown(&kinds, 13_020, None), format!("{} and NVIDIA H200 (9.0), CUDA driver 13.2", kinds[0]));
        assert!(Error::Mixed(kinds.join(", ")).to_string().contains("H200 (9.0)), whose results differ: choose"));
        if !std::path::Path::new("/dev/nvidiactl").exists() {
            assert_eq!(numerics(), "", "there is no GPU to name");
        }
        let gpu = Error::OldGpu { index: 0, name: "Tesla V100".into(), major: 7, minor: 0 }.to_string();
        assert!(gpu.contains("7.0") && gpu.contains("8.0"), "{gpu}");
    }
}
