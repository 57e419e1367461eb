//! Linear layers as views of a flat bucket, and their part of the backward pass.

use super::{Error, Leaves};
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::operation::operation;
use crate::ops::{matmul, rows};
use tch::{Kind, Tensor};
use unisono_configs::model::Bucket;

/// A low-rank addition to a linear layer: none exists so far.
pub enum Adapter {}

/// `x @ weight^T + bias`. The bias is added by the loop that reads the product, in fp32.
pub struct Linear {
    /// `[out, in]`, a view of the bucket.
    pub weight: Tensor,
    /// `[out]`, a view of the bucket.
    pub bias: Option<Tensor>,
    pub adapter: Option<Adapter>,
    /// Whether its gradients are computed at all.
    pub trainable: bool,
    weight_offset: usize,
    bias_offset: usize,
}

/// Where gradients go: the leaves of one bucket.
pub struct Sink<'a> {
    pub leaves: &'a mut dyn Leaves,
    pub bucket: usize,
    pub pool: &'a Pool,
}

impl Sink<'_> {
    pub fn dense(&mut self, offset: usize, gradient: &Tensor) -> Result<(), Error> {
        Ok(operation("leaves", || self.leaves.dense(self.bucket, offset, gradient))?)
    }

    pub fn matrix(&mut self, offset: usize, gradient: Buffer) -> Result<(), Error> {
        Ok(self.leaves.matrix(self.bucket, offset, gradient)?)
    }
}

/// The tensor of `bucket` whose name ends in `suffix`, as a view of the bucket's flat `parameters`, with its offset.
pub fn view(parameters: &Tensor, bucket: &Bucket, suffix: &str) -> Option<(Tensor, usize)> {
    let slot = bucket.tensor(suffix)?;
    let shape: Vec<i64> = slot.shape.iter().map(|&n| n as i64).collect();
    Some((parameters.narrow(0, slot.offset as i64, slot.elements() as i64).view(shape.as_slice()), slot.offset))
}

impl Linear {
    /// The layers `names` of a block, which read the same input: one layer with all their rows where the weights lie one
    /// after another without biases between them (one larger matrix product), else one layer each.
    pub fn group(parameters: &Tensor, bucket: &Bucket, names: &[&str]) -> Vec<Linear> {
        let layers = names.iter().map(|name| {
            let (weight, weight_offset) =
                view(parameters, bucket, &format!("{name}.weight")).expect("the layout has every weight of a block");
            let bias = view(parameters, bucket, &format!("{name}.bias"));
            let bias_offset = bias.as_ref().map_or(0, |(_, offset)| *offset);
            let bias = bias.map(|(bias, _)| bias);
            Linear { weight, bias, adapter: None, trainable: true, weight_offset, bias_offset }
        });
        let mut group: Vec<Linear> = Vec::new();
        for layer in layers {
            match group.last_mut() {
                Some(last) if last.continues(&layer) => {
                    let (rows, width) = (last.outputs() + layer.outputs(), last.inputs());
                    let elements = (rows * width) as i64;
                    let flat = parameters.narrow(0, last.weight_offset as i64, elements);
                    last.weight = flat.view([rows as i64, width as i64]);
                }
                _ => group.push(layer),
            }
        }
        // Callers tell "all in one" from "one each" by the length: nothing in between.
        match group.len() {
            1 => group,
            n if n == names.len() => group,
            _ => unreachable!("biases are on all layers of a group or on none"),
        }
    }

    fn continues(&self, next: &Linear) -> bool {
        let end = self.weight_offset + self.weight.numel();
        self.bias.is_none() && next.bias.is_none() && end == next.weight_offset && self.inputs() == next.inputs()
    }

    pub fn outputs(&self) -> usize {
        self.weight.size()[0] as usize
    }

    pub fn inputs(&self) -> usize {
        self.weight.size()[1] as usize
    }

    /// `input @ weight^T`, without the bias: `[T, out]`.
    pub fn forward(&self, input: &Tensor, pool: &Pool) -> Result<Buffer, Error> {
        let output = pool.take(self.weight.kind(), &[input.size()[0] as usize, self.outputs()]);
        operation("gemm", || matmul::product(input, &self.weight.tr(), &output))?;
        if let Some(adapter) = &self.adapter {
            match *adapter {}
        }
        Ok(output)
    }

    /// Hands the gradients of weight and bias to `sink`: `grad` `[T, out]` and the forward's `input` `[T, in]`, in the
    /// compute kind; gradients of weights come in that kind too, those of biases wide.
    pub fn gradients(&self, grad: &Tensor, input: &Tensor, wide: Kind, sink: &mut Sink<'_>) -> Result<(), Error> {
        if !self.trainable {
            return Ok(());
        }
        let weight = sink.pool.take(self.weight.kind(), &[self.outputs(), self.inputs()]);
        operation("gemm dW", || matmul::product(&grad.tr(), input, &weight))?;
        sink.matrix(self.weight_offset, weight)?;
        if self.bias.is_some() {
            sink.dense(self.bias_offset, &operation("bias", || rows::sum_columns(grad, wide)))?;
        }
        Ok(())
    }
}

/// The gradient of the input that all layers of a group read: `[T, in]` of the compute kind, from that of each output.
pub fn input_gradient(group: &[Linear], grads: &[&Tensor], pool: &Pool) -> Result<Buffer, Error> {
    let shape = [grads[0].size()[0] as usize, group[0].inputs()];
    let kind = group[0].weight.kind();
    let mut sum = pool.take(kind, &shape);
    operation("gemm dX", || matmul::product(grads[0], &group[0].weight, &sum))?;
    for (layer, grad) in group.iter().zip(grads).skip(1) {
        let part = pool.take(kind, &shape);
        operation("gemm dX", || matmul::product(grad, &layer.weight, &part))?;
        operation("gemm dX", || drop(sum.g_add_(&part)));
    }
    Ok(sum)
}
