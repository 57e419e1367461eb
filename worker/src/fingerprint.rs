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

/// The best instruction set that ATen's and oneDNN's kernels dispatch on, and whatever the environment makes of it.
fn instruction_set() -> String {
    let mut set = best().to_owned();
    for variable in
        ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"]
    {
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
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_ascii_whitespace().any(|f| f == flag)
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
