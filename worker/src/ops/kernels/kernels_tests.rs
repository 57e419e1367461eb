//! The kernels compile, for every GPU that counts, and their launches are checked. What they compute is tested beside the
//! host's loops: tests/operations.rs, tests/kernels.rs and the optimizer's own tests.

use super::*;

/// Without NVRTC there is nothing to test it with; `scripts/nvrtc` fetches it.
#[test]
fn every_kernel_compiles_for_ampere_and_hopper() {
    if let Some(dir) = nvrtc::cached() {
        std::env::set_var("UNISONO_NVRTC", dir);
    }
    for architecture in ["sm_80", "sm_90"] {
        let code = match nvrtc::compile(&source(), architecture) {
            Err(nvrtc::Error::Missing(reason)) if std::env::var_os("UNISONO_NVRTC").is_none() => {
                eprintln!("skipped: NVRTC is not here ({reason}); scripts/nvrtc fetches it");
                return;
            }
            outcome => outcome.unwrap(),
        };
        assert_eq!(&code[..4], b"\x7fELF");
        for name in names() {
            let symbol = format!("\0{name}\0");
            assert!(code.windows(symbol.len()).any(|w| w == symbol.as_bytes()), "{name} for {architecture}");
        }
        let broken = nvrtc::compile("__global__ void broken( {", architecture).unwrap_err().to_string();
        assert!(broken.contains("kernels.cu(1)") && broken.contains(architecture), "{broken}");
    }
}

#[test]
fn a_launch_with_other_arguments_than_the_kernel_s_is_refused() {
    let _emulated = emulator::Emulated::begin().unwrap();
    let table = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
    let kernels = Kernels::on(&table).unwrap();
    assert_eq!(kernels, Kernels::Emulated);
    let (ids, output) = (Tensor::from_slice(&[1i32, -1]), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu)));
    let arguments = [(&table).into(), (&ids).into(), (&output).into(), 2usize.into()];
    kernels.launch("look_up_float", blocks(2, 256), &arguments);
    assert_eq!(Vec::<f32>::try_from(output.view(-1)).unwrap(), [3.0, 4.0, 0.0, 0.0]);
    let refused = |name, grid, arguments| emulator::launch(name, grid, arguments).unwrap_err();
    assert!(refused("look_up_float", blocks(1, 256), &arguments[..3]).contains("not those of the kernel"));
    assert!(refused("look_up_float", blocks(1, 33), &arguments).contains("whole warps"));
    assert!(refused("look_down", blocks(1, 32), &arguments).contains("no such kernel"));
    drop(_emulated);
    assert!(Kernels::on(&table).is_none());
}
