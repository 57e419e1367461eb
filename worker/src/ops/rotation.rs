//! The tables of rotary position embedding.

use tch::{Device, Kind, Tensor};
use unisono_configs::model::Rope;

/// Cosines and sines of every position and pair.
pub struct Rotation {
    /// Wide `[positions, D / 2]`.
    pub cos: Tensor,
    pub sin: Tensor,
    pub positions: usize,
}

/// The clone shares the tables.
impl Clone for Rotation {
    fn clone(&self) -> Self {
        Rotation { cos: self.cos.shallow_clone(), sin: self.sin.shallow_clone(), positions: self.positions }
    }
}

impl Rotation {
    /// Angles are products of fp32 numbers rounded to fp32, as in transformers, with which models are trained.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize, wide: Kind, device: Device) -> Self {
        let frequencies = rope.inverse_frequencies(head_dim);
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |&f| (p as f32 * f as f32) as f64));
        let (cos, sin): (Vec<f64>, Vec<f64>) = angles.map(|a| (a.cos(), a.sin())).unzip();
        let table = |values: Vec<f64>| {
            let shape = [positions as i64, head_dim as i64 / 2];
            Tensor::from_slice(&values).view(shape).to_kind(wide).to_device(device)
        };
        Rotation { cos: table(cos), sin: table(sin), positions }
    }
}
