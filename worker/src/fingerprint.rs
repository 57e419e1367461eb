//! What decides the bits of this worker's arithmetic: workers that differ in it do not run together.

use crate::device;
use std::io;
use unisono_proto::v1::Fingerprint;

/// The fingerprint of this process, whatever it will compute on.
pub fn fingerprint() -> io::Result<Fingerprint> {
    // The running file itself, even where its path has been replaced meanwhile.
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open("/proc/self/exe")?)?;
    Ok(Fingerprint {
        device: "cpu".into(),
        instruction_set: instruction_set(),
        libtorch: env!("UNISONO_LIBTORCH").into(),
        binary: hasher.finalize().to_hex().to_string(),
        gpu: device::numerics(),
    })
}

/// What else decides which kernels libraries take, and so the order of their sums.
const VARIABLES: [&str; 12] = [
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_BLAS_PREFER_CUBLASLT",
];

/// The best instruction set that ATen's and oneDNN's kernels dispatch on, what else of the processor they go by (MKL by who
/// made it, oneDNN's blocks by its caches), and whatever the environment makes of it.
fn instruction_set() -> String {
    let mut set = best().to_owned();
    let cache = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").unwrap_or_default();
    let known = [cpuinfo("vendor_id"), cache.trim().to_owned()];
    known.iter().filter(|word| !word.is_empty()).for_each(|word| set.push_str(&format!(" {word}")));
    for variable in VARIABLES {
        if let Ok(value) = std::env::var(variable) {
            set.push_str(&format!("+{variable}={value}"));
        }
    }
    set
}

#[cfg(target_arch = "x86_64")]
fn best() -> &'static str {
    let amx = kernel_lists("amx_bf16");
    if amx {
        "amx_bf16"
    } else if is_x86_feature_detected!("avx512bf16") {
        "avx512_bf16"
    } else if is_x86_feature_detected!("avx512vnni") {
        "avx512_vnni"
    } else if is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") {
        "avx512"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "avx2"
    } else {
        "x86_64"
    }
}

#[cfg(target_arch = "x86_64")]
fn kernel_lists(flag: &str) -> bool {
    cpuinfo("flags").split_ascii_whitespace().any(|f| f == flag)
}

/// What the kernel says of the first processor under `name`; empty: nothing.
fn cpuinfo(name: &str) -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.find(|(key, _)| key.trim() == name).map_or(String::new(), |(_, value)| value.trim().to_owned())
}

#[cfg(not(target_arch = "x86_64"))]
fn best() -> &'static str {
    std::env::consts::ARCH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fingerprint_is_whole_and_repeats() {
        let first = fingerprint().unwrap();
        assert_eq!(first, fingerprint().unwrap());
        assert_eq!(first.binary.len(), 64);
        assert!(first.libtorch.starts_with(|c: char| c.is_ascii_digit()), "{first:?}");
    }
}
