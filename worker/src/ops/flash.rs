//! FlashAttention (Dao 2023) over documents that lie flat, by ATen's kernels: FlashAttention 2 for variable lengths on a
//! GPU, its backward in the deterministic form; on a host ATen's own flash kernels, document by document, which tests use.
//!
//! Queries are `[rows, heads, D]`, keys and values `[rows, kv heads, D]`, in bf16 on a GPU.

use super::dispatcher::{self, Value};
use super::documents::Flat;
use tch::{Device, Kind, Tensor};

/// Whether attention is computed by FlashAttention: on a GPU, where its kernels take such heads.
pub fn serves(device: Device, compute: Kind, head_dim: usize) -> bool {
    device != Device::Cpu && compute == Kind::BFloat16 && head_dim.is_multiple_of(8) && head_dim <= 256
}

/// What attention is over.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub flat: &'a Flat,
    /// How many latest keys a query sees, its own included.
    pub window: Option<usize>,
    pub scale: f64,
}

/// What the forward pass gives.
pub struct Attended {
    /// `[rows, heads, D]`
    pub output: Tensor,
    /// Log-sum-exp of the scores, as the backward pass of the same device wants it.
    pub lse: Tensor,
    /// The state of a random generator that nothing is drawn from, as the backward pass wants it.
    pub random: Vec<Tensor>,
}

impl Attention<'_> {
    fn window(&self) -> (Option<i64>, Option<i64>) {
        let window = self.window.map(|w| w as i64 - 1);
        (window, window.map(|_| 0))
    }

    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended, dispatcher::Refused> {
        if q.device() == Device::Cpu {
            return self.forward_on_host(q, k, v);
        }
        let (starts, longest) = (&self.flat.starts, self.flat.longest as i64);
        let (left, right) = self.window();
        let values = [
            Value::Tensor(q),
            Value::Tensor(k),
            Value::Tensor(v),
            Value::MaybeTensor(Some(starts)),
            Value::MaybeTensor(Some(starts)),
            Value::Int(longest),
            Value::Int(longest),
            Value::Float(0.0),
            Value::Bool(true),
            Value::Bool(false),
            Value::MaybeFloat(Some(self.scale)),
            Value::MaybeInt(left),
            Value::MaybeInt(right),
            Value::MaybeTensor(None),
            Value::MaybeTensor(None),
        ];
        let mut found = dispatcher::call("_flash_attention_forward", "", &values, 5)?;
        let random = found.drain(2..4).collect();
        let lse = found.swap_remove(1);
        Ok(Attended { output: found.swap_remove(0), lse, random })
    }

    /// Gradients of queries, keys and values from that of the output, each like what it is the gradient of.
    pub fn backward(
        &self,
        grad: &Tensor,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        attended: &Attended,
    ) -> Result<[Tensor; 3], dispatcher::Refused> {
        if q.device() == Device::Cpu {
            return self.backward_on_host(grad, (q, k, v), attended);
        }
        let (starts, longest) = (&self.flat.starts, self.flat.longest as i64);
        let (left, right) = self.window();
        let values = [
            Value::Tensor(grad),
            Value::Tensor(q),
            Value::Tensor(k),
            Value::Tensor(v),
            Value::Tensor(&attended.output),
            Value::Tensor(&attended.lse),
            Value::Tensor(starts),
            Value::Tensor(starts),
            Value::Int(longest),
            Value::Int(longest),
            Value::Float(0.0),
            Value::Bool(true),
            Value::Tensor(&attended.random[0]),
            Value::Tensor(&attended.random[1]),
            Value::MaybeFloat(Some(self.scale)),
            Value::MaybeInt(left),
            Value::MaybeInt(right),
        ];
        let found = dispatcher::call("_flash_attention_backward", "", &values, 3)?;
        Ok(found.try_into().expect("three gradients"))
    }

    /// Each document's part of a tensor `[rows, heads, D]` as `[1, heads, length, D]`, keys once for each query head.
    fn document(&self, of: &Tensor, first: i64, length: i64, heads: i64) -> Tensor {
        let part = of.narrow(0, first, length).transpose(0, 1).unsqueeze(0);
        match heads / part.size()[1] {
            1 => part.contiguous(),
            group => part.repeat_interleave_self_int(group, 1, None),
        }
    }

    /// What a document's queries see: none where that is everything before.
    fn mask(&self, length: i64, kind: Kind) -> Option<Tensor> {
        let window = self.window.filter(|&w| (w as i64) < length)? as i64;
        let unseen = Tensor::full([length, length], f64::NEG_INFINITY, (kind, Device::Cpu));
        Some(unseen.triu(1) + unseen.tril(-window))
    }

    fn forward_on_host(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Attended, dispatcher::Refused> {
        let heads = q.size()[1];
        let (output, mut sums) = (q.empty_like(), Vec::new());
        for (first, length) in self.flat.documents() {
            let [q, k, v] = [q, k, v].map(|t| self.document(t, first, length, heads));
            let mask = self.mask(length, q.kind());
            let values = [
                Value::Tensor(&q),
                Value::Tensor(&k),
                Value::Tensor(&v),
                Value::Float(0.0),
                Value::Bool(mask.is_none()),
                Value::MaybeTensor(mask.as_ref()),
                Value::MaybeFloat(Some(self.scale)),
            ];
            let found = dispatcher::call("_scaled_dot_product_flash_attention_for_cpu", "", &values, 2)?;
            output.narrow(0, first, length).copy_(&found[0].squeeze_dim(0).transpose(0, 1));
            sums.push(found[1].to_kind(Kind::Float).reshape([-1]));
        }
        Ok(Attended { output, lse: Tensor::cat(&sums, 0), random: Vec::new() })
    }

    fn backward_on_host(
        &self,
        grad: &Tensor,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        attended: &Attended,
    ) -> Result<[Tensor; 3], dispatcher::Refused> {
        let heads = q.size()[1];
        let gradients = [q.empty_like(), k.empty_like(), v.empty_like()];
        for (first, length) in self.flat.documents() {
            let part = |t: &Tensor| self.document(t, first, length, heads);
            let [grad, q, k, v, output] = [grad, q, k, v, &attended.output].map(part);
            let lse = attended.lse.narrow(0, first * heads, length * heads).view([1, heads, length]);
            let mask = self.mask(length, q.kind());
            let values = [
                Value::Tensor(&grad),
                Value::Tensor(&q),
                Value::Tensor(&k),
                Value::Tensor(&v),
                Value::Tensor(&output),
                Value::Tensor(&lse),
                Value::Float(0.0),
                Value::Bool(mask.is_none()),
                Value::MaybeTensor(mask.as_ref()),
                Value::MaybeFloat(Some(self.scale)),
            ];
            let found = dispatcher::call("_scaled_dot_product_flash_attention_for_cpu_backward", "", &values, 3)?;
            for (whole, part) in gradients.iter().zip(&found) {
                // The gradient of a shared key is the sum over its queries.
                let (own, dim) = (whole.size()[1], whole.size()[2]);
                let part = part.squeeze_dim(0).to_kind(Kind::Float).reshape([own, heads / own, length, dim]);
                let part = part.sum_dim_intlist([1i64].as_slice(), false, Kind::Float).transpose(0, 1);
                whole.narrow(0, first, length).copy_(&part);
            }
        }
        Ok(gradients)
    }
}
