//! Tries leaves without adding them: only whether the exact sum would take them.

use crate::model::{BadNumber, Leaves};
use std::sync::Arc;
use tch::Tensor;
use unisono_configs::model::Layout;

pub struct Trial {
    layout: Arc<Layout>,
    bound: f64,
}

impl Trial {
    /// `bound`: that of the exact sum which is stood in for.
    pub fn new(layout: Arc<Layout>, bound: f64) -> Self {
        Trial { layout, bound }
    }

    fn judge(&self, bucket: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        if gradient.numel() == 0 {
            return Ok(());
        }
        // Both are NaN where any element is. The largest of numbers is the same in any order.
        let (least, most) = gradient.view([-1]).aminmax(None, false);
        let (least, most) = (least.double_value(&[]), most.double_value(&[]));
        match least > -self.bound && most < self.bound {
            true => Ok(()),
            false => {
                let value = if most < self.bound { least } else { most };
                Err(BadNumber { bucket: self.layout.buckets[bucket].name.clone(), value })
            }
        }
    }
}

impl Leaves for Trial {
    fn dense(&mut self, bucket: usize, _: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        self.judge(bucket, gradient)
    }

    fn rows(&mut self, bucket: usize, _: usize, _: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        self.judge(bucket, gradient)
    }
}

#[cfg(test)]
mod tests {
    use super::super::exact::{self, ExactSum};
    use super::*;
    use tch::Kind;
    use unisono_configs::model::{Bucket, TensorSlot};

    /// One bucket of a vector of 40.
    fn layout() -> Arc<Layout> {
        let slot = TensorSlot { name: "a".into(), shape: vec![40], offset: 0 };
        Arc::new(Layout { buckets: vec![Bucket { name: "a".into(), tensors: vec![slot], elements: 40 }] })
    }

    #[test]
    fn what_is_tried_is_judged_as_what_is_added() {
        let bound = exact::bound(8) as f32;
        let below = f32::from_bits(bound.to_bits() - 1);
        let odd = [bound, -bound, below, -below, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, 1e30, -3.0];
        for (place, value) in odd.iter().flat_map(|&value| [0, 17, 39].map(|place| (place, value))) {
            let mut leaf = [0.5f32; 40];
            leaf[place] = value;
            let wide = Tensor::from_slice(&leaf);
            let narrow = wide.to_kind(Kind::BFloat16);
            for leaf in [wide, narrow] {
                let added = ExactSum::new(layout(), 8).dense(0, 0, &leaf);
                let tried = Trial::new(layout(), exact::bound(8)).dense(0, 0, &leaf);
                assert_eq!(added.is_ok(), tried.is_ok(), "{value} at {place} of {:?}", leaf.kind());
            }
        }
    }
}
