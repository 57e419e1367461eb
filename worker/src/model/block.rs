//! One transformer block: attention and gated MLP, each after a norm and added to the residual stream.
//!
//! Shapes: `T` rows (tokens rounded up), `H` hidden, `F` intermediate. The residual stream and its gradient are wide
//! (fp32, or fp64 in tests); operands of matrix products are of the compute kind.

use super::attention::{Attention, Projected};
use super::linear::{input_gradient, view, Linear, Sink};
use super::saved::{Inner, Recompute, Saved};
use super::Error;
use crate::ops::buffer::{Buffer, Pool};
use crate::ops::documents::{Documents, TOKENS};
use crate::ops::heads::{self, Columns, HeadNorm, Heads, NormGradient};
use crate::ops::norm::{self, Addend, Normed};
use crate::ops::operation::operation;
use crate::ops::rotation::Rotation;
use crate::ops::rows;
use crate::ops::swiglu::{self, Biases, GateUp};
use tch::{Kind, Tensor};
use unisono_configs::model::{Bucket, ModelSpec};

/// A weight vector with its place in the bucket.
pub(super) struct Scale {
    pub(super) weight: Tensor,
    offset: usize,
}

/// The parameters of a block, as views of its bucket.
pub struct Block<'a> {
    pub(super) spec: &'a ModelSpec,
    index: usize,
    pub(super) input_norm: Scale,
    /// Queries, keys and values: one layer or three.
    pub(super) qkv: Vec<Linear>,
    pub(super) qk_norm: Option<(Scale, Scale)>,
    pub(super) output: Linear,
    pub(super) mlp_norm: Scale,
    /// Gate and up: one layer or two.
    pub(super) gate_up: Vec<Linear>,
    pub(super) down: Linear,
}

/// What all blocks of a micro-batch share.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    pub documents: &'a Documents,
    pub rotation: &'a Rotation,
    pub wide: Kind,
    pub pool: &'a Pool,
    pub recompute: Recompute,
}

/// The residual stream before a block.
pub enum Stream<'a> {
    /// The embedding: wide `[T, H]`.
    Embedded(Buffer),
    /// The stream within the block before, and what its MLP adds.
    Within { residual: &'a Tensor, mlp: Buffer, bias: Option<Tensor> },
}

/// The gradient of the residual stream: wide `[T, H]`, and rounded to the compute kind.
pub struct Gradient {
    pub wide: Buffer,
    pub rounded: Buffer,
}

/// Which part of the projections: tensor and first column of head 0.
pub(super) struct Part {
    pub(super) tensor: usize,
    pub(super) first: usize,
}

impl<'a> Block<'a> {
    /// The block of bucket `bucket`, whose flat parameters are `parameters`; `index` is the bucket's in the layout.
    pub fn new(spec: &'a ModelSpec, bucket: &Bucket, parameters: &Tensor, index: usize) -> Self {
        let scale = |suffix: &str| view(parameters, bucket, suffix).map(|(weight, offset)| Scale { weight, offset });
        let group = |names: &[&str]| Linear::group(parameters, bucket, names);
        let single = |name: &str| group(&[name]).pop().expect("a group of one");
        Block {
            spec,
            index,
            input_norm: scale("input_layernorm.weight").expect("a block has an input norm"),
            qkv: group(&["q_proj", "k_proj", "v_proj"]),
            qk_norm: scale("q_norm.weight").zip(scale("k_norm.weight")),
            output: single("o_proj"),
            mlp_norm: scale("post_attention_layernorm.weight").expect("a block has a norm before the MLP"),
            gate_up: group(&["gate_proj", "up_proj"]),
            down: single("down_proj"),
        }
    }

    pub fn down_bias(&self) -> Option<Tensor> {
        self.down.bias.as_ref().map(Tensor::shallow_clone)
    }

    pub(super) fn query_heads(&self) -> Heads {
        Heads { count: self.spec.heads, kv: self.spec.kv_heads, dim: self.spec.head_dim }
    }

    pub(super) fn key_heads(&self) -> Heads {
        Heads { count: self.spec.kv_heads, ..self.query_heads() }
    }

    fn attention<'b>(&self, scene: Scene<'b>) -> Attention<'b> {
        Attention {
            documents: scene.documents,
            queries: self.query_heads(),
            window: self.spec.sliding_window,
            wide: scene.wide,
            pool: scene.pool,
        }
    }

    /// Queries, keys and values among the outputs of [`Block::qkv`].
    pub(super) fn parts(&self) -> [Part; 3] {
        let (q, kv) = (self.query_heads().width(), self.key_heads().width());
        match self.qkv.len() {
            1 => [0, q, q + kv].map(|first| Part { tensor: 0, first }),
            _ => [0, 1, 2].map(|tensor| Part { tensor, first: 0 }),
        }
    }

    fn head_norm<'b>(&self, scale: &'b Scale) -> HeadNorm<'b> {
        HeadNorm { weight: &scale.weight, eps: self.spec.norm_eps }
    }

    pub(super) fn columns<'b>(&'b self, part: &Part, outputs: &'b [Buffer]) -> Columns<'b> {
        Columns { matrix: &outputs[part.tensor], first: part.first, bias: self.qkv[part.tensor].bias.as_ref() }
    }

    fn split(&self, scene: Scene<'_>, outputs: &[Buffer]) -> Projected {
        let [q, k, v] = self.parts();
        let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (self.head_norm(q), self.head_norm(k))).unzip();
        let split = |part: &Part, norm, rotation, heads: Heads| {
            let kind = outputs[part.tensor].kind();
            let mut flat = scene.pool.take(kind, &[scene.documents.padded * heads.width()]);
            let source = self.columns(part, outputs);
            operation("rope", || heads::split(source, norm, rotation, scene.documents, heads, &mut flat));
            flat
        };
        Projected {
            q: split(&q, q_norm, Some(scene.rotation), self.query_heads()),
            k: split(&k, k_norm, Some(scene.rotation), self.key_heads()),
            v: split(&v, None, None, self.key_heads()),
        }
    }

    /// The block over `stream`: what to keep, and what its MLP adds to [`Saved::middle`], `[T, H]` of the compute kind.
    /// After attention only the rows `chosen` go on, if there is such a choice: then `T` becomes their number, rounded up.
    pub fn forward(
        &self,
        scene: Scene<'_>,
        stream: Stream<'_>,
        chosen: Option<&[u32]>,
    ) -> Result<(Saved, Buffer), Error> {
        let mut saved = self.up_to_activation(scene, stream, chosen)?;
        let activated = saved.inner.as_ref().and_then(|inner| inner.activated.as_ref());
        let mlp = self.down.forward(activated.expect("the forward pass ends in it"), scene.pool)?;
        saved.shrink(scene.recompute);
        Ok((saved, mlp))
    }

    /// Norms the rows of a wide stream after adding `addend` to it: the inverse root mean squares, and the result.
    fn norm(
        &self,
        scene: Scene<'_>,
        input: &Tensor,
        addend: Option<Addend<'_>>,
        scale: &Scale,
        residual: Option<&mut Tensor>,
    ) -> (Buffer, Buffer) {
        let (rows, hidden) = (input.size()[0] as usize, self.spec.hidden);
        let mut rstd = scene.pool.take(scene.wide, &[rows]);
        let mut output = scene.pool.take(self.output.weight.kind(), &[rows, hidden]);
        let out = Normed { residual, rstd: &mut rstd, output: &mut output };
        operation("norm", || norm::forward(input, addend, &scale.weight, self.spec.norm_eps, out));
        (rstd, output)
    }

    fn up_to_activation(&self, scene: Scene<'_>, stream: Stream<'_>, chosen: Option<&[u32]>) -> Result<Saved, Error> {
        let (pool, wide, hidden) = (scene.pool, scene.wide, self.spec.hidden);
        let (input, input_rstd, input_normed) = match stream {
            Stream::Embedded(input) => {
                let (rstd, output) = self.norm(scene, &input, None, &self.input_norm, None);
                (input, rstd, output)
            }
            Stream::Within { residual, mlp, bias } => {
                let mut input = pool.take(wide, &[scene.documents.rows, hidden]);
                let addend = Addend { output: &mlp, bias: bias.as_ref() };
                let (rstd, output) = self.norm(scene, residual, Some(addend), &self.input_norm, Some(&mut *input));
                (input, rstd, output)
            }
        };
        let mut projections = Vec::new();
        for layer in &self.qkv {
            projections.push(layer.forward(&input_normed, pool)?);
        }
        let heads = self.split(scene, &projections);
        if self.qk_norm.is_none() {
            projections.clear();
        }
        let attended = self.attention(scene).forward(&heads)?;
        let (attended_chosen, input_chosen) =
            chosen.map(|at| (self.choose(at, &attended.output, pool), self.choose(at, &input, pool))).unzip();
        let attention = self.output.forward(attended_chosen.as_ref().unwrap_or(&attended.output), pool)?;
        let mut middle = pool.take(wide, &[attention.size()[0] as usize, hidden]);
        let addend = Addend { output: &attention, bias: self.output.bias.as_ref() };
        let before = input_chosen.as_ref().unwrap_or(&input);
        let (middle_rstd, middle_normed) = self.norm(scene, before, Some(addend), &self.mlp_norm, Some(&mut *middle));
        drop(attention);
        let (gate_up, activated) = self.activate(scene, &middle_normed)?;
        let inner = Inner {
            input_rstd,
            input_normed: Some(input_normed),
            projections,
            heads,
            attended,
            attended_chosen,
            middle,
            middle_rstd,
            middle_normed: Some(middle_normed),
            gate_up: Some(gate_up),
            activated: Some(activated),
        };
        Ok(Saved { input, chosen: chosen.map(<[u32]>::to_vec), inner: Some(inner) })
    }

    /// Gate and up with their biases, and what comes of them.
    fn activate(&self, scene: Scene<'_>, normed: &Tensor) -> Result<(Vec<Buffer>, Buffer), Error> {
        let mut gate_up = Vec::new();
        for layer in &self.gate_up {
            gate_up.push(layer.forward(normed, scene.pool)?);
        }
        let activated = self.activation(scene, &mut gate_up, self.gate_up_bias());
        Ok((gate_up, activated))
    }

    fn activation(&self, scene: Scene<'_>, gate_up: &mut [Buffer], biases: Biases<'_>) -> Buffer {
        let (kind, rows) = (gate_up[0].kind(), gate_up[0].size()[0] as usize);
        let mut activated = scene.pool.take(kind, &[rows, self.spec.intermediate]);
        operation("swiglu", || swiglu::forward(gate_and_up(gate_up), biases, &mut activated));
        activated
    }

    /// The rows `at` of a matrix, rounded up with zero rows.
    fn choose(&self, at: &[u32], all: &Tensor, pool: &Pool) -> Buffer {
        let rows = at.len().next_multiple_of(TOKENS);
        let mut few = pool.take(all.kind(), &[rows, all.size()[1] as usize]);
        operation("choice", || rows::pick(all, at, &mut few));
        few
    }

    pub(super) fn gate_up_bias(&self) -> Option<(&Tensor, &Tensor)> {
        self.gate_up.first().and_then(|l| l.bias.as_ref()).zip(self.gate_up.last().and_then(|l| l.bias.as_ref()))
    }

    /// Hands the block's leaves to `leaves` and turns the gradient of the stream after the block into that before it.
    pub fn backward(
        &self,
        scene: Scene<'_>,
        saved: Saved,
        grad: &mut Gradient,
        leaves: &mut dyn super::Leaves,
    ) -> Result<(), Error> {
        let (pool, wide) = (scene.pool, scene.wide);
        let mut sink = Sink { leaves, bucket: self.index, pool };
        let Saved { input, chosen, inner } = match saved.inner {
            Some(_) => saved,
            None => self.up_to_activation(scene, Stream::Embedded(saved.input), saved.chosen.as_deref())?,
        };
        let mut inner = inner.expect("kept, or computed again");
        let (middle_normed, mut gate_up, activated) = self.mlp_again(scene, &mut inner)?;

        self.down.gradients(&grad.rounded, &activated, wide, &mut sink)?;
        let grad_activated = input_gradient(std::slice::from_ref(&self.down), &[&grad.rounded], pool)?;
        drop(activated);
        operation("swiglu backward", || {
            swiglu::backward(&grad_activated, gate_and_up(&mut gate_up));
        });
        drop(grad_activated);
        for (layer, grad) in self.gate_up.iter().zip(&gate_up) {
            layer.gradients(grad, &middle_normed, wide, &mut sink)?;
        }
        drop(middle_normed);
        let grad_normed = input_gradient(&self.gate_up, &gate_up.iter().map(|g| &**g).collect::<Vec<_>>(), pool)?;
        drop(gate_up);
        self.norm_backward(&grad_normed, (&inner.middle, &inner.middle_rstd), &self.mlp_norm, grad, &mut sink)?;
        drop(grad_normed);

        self.output.gradients(&grad.rounded, inner.attended(), wide, &mut sink)?;
        let mut grad_attended = input_gradient(std::slice::from_ref(&self.output), &[&grad.rounded], pool)?;
        if let Some(at) = &chosen {
            let spread = |few: &Tensor| {
                let mut all = pool.take(few.kind(), &[scene.documents.rows, few.size()[1] as usize]);
                operation("choice", || rows::scatter(few, at, &mut all));
                all
            };
            grad_attended = spread(&grad_attended);
            *grad = Gradient { wide: spread(&grad.wide), rounded: spread(&grad.rounded) };
        }
        let Inner { input_rstd, input_normed, projections, heads, attended, .. } = inner;
        let grad_heads = self.attention(scene).backward(&grad_attended, &heads, &attended)?;
        drop((grad_attended, attended, heads));
        let grad_projections = self.join(scene, &grad_heads, &projections, &mut sink)?;
        drop((grad_heads, projections));
        let input_normed = input_normed.unwrap_or_else(|| self.norm(scene, &input, None, &self.input_norm, None).1);
        for (layer, grad) in self.qkv.iter().zip(&grad_projections) {
            layer.gradients(grad, &input_normed, wide, &mut sink)?;
        }
        drop(input_normed);
        let grad_normed = input_gradient(&self.qkv, &grad_projections.iter().map(|g| &**g).collect::<Vec<_>>(), pool)?;
        drop(grad_projections);
        self.norm_backward(&grad_normed, (&input, &input_rstd), &self.input_norm, grad, &mut sink)
    }

    /// What the MLP read, its gate and up, and what came of them: as kept, else computed again.
    fn mlp_again(&self, scene: Scene<'_>, inner: &mut Inner) -> Result<(Buffer, Vec<Buffer>, Buffer), Error> {
        let normed = match inner.middle_normed.take() {
            Some(normed) => normed,
            None => self.norm(scene, &inner.middle, None, &self.mlp_norm, None).1,
        };
        Ok(match (inner.gate_up.take(), inner.activated.take()) {
            (Some(gate_up), Some(activated)) => (normed, gate_up, activated),
            // Their biases are in them.
            (Some(mut gate_up), None) => {
                let activated = self.activation(scene, &mut gate_up, None);
                (normed, gate_up, activated)
            }
            (None, _) => {
                let (gate_up, activated) = self.activate(scene, &normed)?;
                (normed, gate_up, activated)
            }
        })
    }

    /// Gradients of the projections' outputs, from those of the heads; hands over those of the heads' norms.
    fn join(
        &self,
        scene: Scene<'_>,
        grads: &Projected,
        outputs: &[Buffer],
        sink: &mut Sink<'_>,
    ) -> Result<Vec<Buffer>, Error> {
        let kind = grads.q.kind();
        let take = |layer: &Linear| scene.pool.take(kind, &[scene.documents.rows, layer.outputs()]);
        let mut joined: Vec<Buffer> = self.qkv.iter().map(take).collect();
        let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (q, k)).unzip();
        let sources = [
            (&grads.q, q_norm, Some(scene.rotation), self.query_heads()),
            (&grads.k, k_norm, Some(scene.rotation), self.key_heads()),
            (&grads.v, None, None, self.key_heads()),
        ];
        for (part, (grad, scale, rotation, heads)) in self.parts().iter().zip(sources) {
            let mut grad_weight = scene.pool.take(scene.wide, &[heads.dim]);
            let norm = scale.map(|scale| NormGradient {
                source: self.columns(part, outputs),
                norm: self.head_norm(scale),
                grad_weight: &mut grad_weight,
            });
            let output = &mut joined[part.tensor];
            operation("rope backward", || {
                heads::join(grad, norm, rotation, scene.documents, heads, output, part.first);
            });
            if let Some(scale) = scale {
                sink.dense(scale.offset, &grad_weight)?;
            }
        }
        Ok(joined)
    }

    fn norm_backward(
        &self,
        grad_normed: &Tensor,
        (residual, rstd): (&Tensor, &Tensor),
        scale: &Scale,
        grad: &mut Gradient,
        sink: &mut Sink<'_>,
    ) -> Result<(), Error> {
        let mut grad_weight = sink.pool.take(residual.kind(), &[self.spec.hidden]);
        let saved = norm::Saved { residual, rstd, weight: &scale.weight };
        operation("norm backward", || {
            norm::backward(grad_normed, saved, &mut grad.wide, &mut grad.rounded, &mut grad_weight);
        });
        sink.dense(scale.offset, &grad_weight)
    }
}

pub(super) fn gate_and_up(outputs: &mut [Buffer]) -> GateUp<'_> {
    match outputs {
        [both] => GateUp::Merged(both),
        [gate, up] => GateUp::Apart(gate, up),
        _ => unreachable!("gate and up are one layer or two"),
    }
}
