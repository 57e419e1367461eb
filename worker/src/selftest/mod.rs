//! What a machine's device really does: operations against fp64, whole models against transformers, and speed. For people
//! who are about to trust a GPU, and for `make gpu-check`; nothing of it is part of a run.

mod models;
mod operations;
mod speed;

use crate::device;
use crate::ops::form::AtenOnly;
use crate::ops::kernels::emulator::Emulated;
use serde_json::{json, Value};
use std::path::PathBuf;
use std::time::Instant;
use tch::{Device, Kind, Tensor};

pub use speed::Load;

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Device(#[from] device::Error),
    #[error(transparent)]
    Spec(#[from] unisono_configs::model::spec::Error),
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    #[error("{path}: {problem}", path = path.display())]
    Golden { path: PathBuf, problem: String },
    #[error("{0}")]
    Emulator(String),
}

/// What to look at.
#[derive(Debug)]
pub enum Part {
    /// Every operation in every form against fp64.
    Operations,
    /// Small random models against themselves in fp64, and twice for the same bits.
    Models,
    /// Models in this directory against what transformers made of them (`goldens/make.py`).
    Goldens(PathBuf),
    /// Forward and backward passes of a model, random tokens.
    Speed(Load),
}

/// How operations are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As in a run.
    Own,
    Aten,
    /// Kernels of a GPU on a processor.
    Emulated,
}

/// Keeps a form while it lives.
enum Guard {
    Own,
    Aten(#[allow(dead_code)] AtenOnly),
    Emulated(#[allow(dead_code)] Emulated),
}

impl Form {
    /// Those that `device` has.
    fn all(device: Device) -> &'static [Form] {
        match device {
            Device::Cpu => &[Form::Own, Form::Aten, Form::Emulated],
            _ => &[Form::Own, Form::Aten],
        }
    }

    fn begin(self) -> Result<Guard, Error> {
        Ok(match self {
            Form::Own => Guard::Own,
            Form::Aten => Guard::Aten(AtenOnly::begin()),
            Form::Emulated => Guard::Emulated(Emulated::begin().map_err(Error::Emulator)?),
        })
    }

    fn name(self, device: Device) -> &'static str {
        match (self, device) {
            (Form::Own, Device::Cpu) => "loops",
            (Form::Own, _) => "kernels",
            (Form::Aten, _) => "aten",
            (Form::Emulated, _) => "emulated kernels",
        }
    }
}

/// Looks at `part` on the device `name`; hands each finding to `report`. Whether all was as it should be.
pub fn run(name: &str, part: &Part, report: &mut dyn FnMut(Value)) -> Result<bool, Error> {
    let device = device::open(name, 0)?;
    let mut reporter = Reporter { report, good: true };
    tch::no_grad(|| match part {
        Part::Operations => operations::check(device, &mut reporter),
        Part::Models => models::check(device, &mut reporter),
        Part::Goldens(dir) => models::goldens(device, dir, &mut reporter),
        Part::Speed(load) => speed::measure(device, load, &mut reporter),
    })?;
    Ok(reporter.good)
}

struct Reporter<'a> {
    report: &'a mut dyn FnMut(Value),
    good: bool,
}

impl Reporter<'_> {
    /// One comparison: how far off, and how far it may be.
    fn compare(&mut self, what: &str, form: &str, kind: Kind, off: f64, limit: f64, begun: Instant) {
        let good = off <= limit;
        self.good &= good;
        let (kind, seconds) = (word(kind), begun.elapsed().as_secs_f64());
        (self.report)(
            json!({"check": what, "form": form, "kind": kind, "off": off, "limit": limit, "good": good, "seconds": seconds}),
        );
    }

    fn say(&mut self, finding: Value) {
        (self.report)(finding);
    }
}

fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::BFloat16 => "bf16",
        Kind::Float => "fp32",
        _ => "fp64",
    }
}

/// Relative distance of two tensors of any kind and device; infinite where one is not a number.
fn distance(found: &Tensor, exact: &Tensor) -> f64 {
    let wide = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double).reshape([-1]);
    let norm = |t: &Tensor| t.square().sum(Kind::Double).double_value(&[]).sqrt();
    let (found, exact) = (wide(found), wide(exact));
    let (difference, size) = (norm(&(found - &exact)), norm(&exact));
    match difference.is_nan() {
        true => f64::INFINITY,
        false if size == 0.0 => difference,
        false => difference / size,
    }
}

/// Waits for everything that was asked of a device.
fn synchronise(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// A small reproducible generator.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }

    /// Uniform in [-1, 1), as bf16 holds it: every kind then computes with the same inputs.
    fn tensor(&mut self, shape: &[i64]) -> Tensor {
        let count = shape.iter().product::<i64>() as usize;
        let values: Vec<f64> = (0..count).map(|_| self.bits() as f64 / (1u64 << 30) as f64 - 1.0).collect();
        Tensor::from_slice(&values).to_kind(Kind::BFloat16).to_kind(Kind::Double).view(shape)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    fn findings(part: &Part) -> (bool, Vec<Value>) {
        tch::set_num_threads(1);
        let mut found = Vec::new();
        let good = run("cpu", part, &mut |finding| found.push(finding)).unwrap();
        (good, found)
    }

    #[test]
    fn every_operation_is_right_in_every_form() {
        let (good, found) = findings(&Part::Operations);
        let bad: Vec<_> = found.iter().filter(|f| f["good"] != true).collect();
        assert!(good && bad.is_empty(), "{bad:?}");
        for form in ["loops", "aten", "emulated kernels"] {
            assert!(found.iter().filter(|f| f["form"] == form).count() >= 14, "{form}");
        }
    }

    #[test]
    fn models_are_right_and_repeat() {
        let (good, found) = findings(&Part::Models);
        assert!(good, "{found:?}");
        let (good, found) = findings(&Part::Goldens(Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens")));
        assert!(good && found.len() >= 8, "{found:?}");
    }

    #[test]
    fn speed_is_measured() {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../goldens/qwen2");
        let load =
            Load { model, compute: Kind::Float, tokens: 128, document: 32, share: 1.0, passes: 2, recompute: None };
        let (good, found) = findings(&Part::Speed(load));
        assert!(good && found[0]["tokens_per_second"].as_f64().unwrap() > 0.0, "{found:?}");
        assert!(found[0]["matmul_tflops"].as_f64().unwrap() > 0.0);
    }

    #[test]
    fn what_is_wrong_is_found() {
        let exact = Random(1).tensor(&[10]);
        assert_eq!(distance(&exact, &exact), 0.0);
        assert_eq!(distance(&(&exact / 0.0), &exact), f64::INFINITY);
        let mut found = Vec::new();
        let mut report = |finding| found.push(finding);
        let mut reporter = Reporter { report: &mut report, good: true };
        reporter.compare("norm", "loops", Kind::Float, f64::NAN, 1.0, Instant::now());
        assert!(!reporter.good);
        assert_eq!(found[0]["good"], false);
    }
}
