//! Greedy decoding with a cache of keys and values.
//!
//! A prompt's result must not depend on its neighbours: every prompt is read alone, and steps always compute
//! [`ROWS`] rows, whose products do not depend on one another.

use super::block::{Block, Stream};
use super::head::Last;
use super::wave::Passage;
use super::{Batch, Error, Model};
use crate::ops::buffer::Buffer;
use crate::ops::cross_entropy::first_choices;
use crate::ops::documents::LENGTH;
use crate::ops::form::wide;
use crate::ops::heads::Heads;
use crate::ops::norm::{self, Addend, Normed};
use crate::ops::rotation::Rotation;
use crate::ops::simd::{dot, exp, max, vectorised, Narrow};
use crate::ops::view::{elements, elements_mut};
use crate::ops::{rows, swiglu};
use half::bf16;
use tch::{Kind, Tensor};

/// Prompts that are continued at once.
const ROWS: usize = 64;

/// Keys and values of one prompt in one block, position by position: `[positions, kv heads * D]` each.
#[derive(Clone, Default)]
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// One prompt that is being continued.
struct Slot {
    /// By block.
    caches: Vec<Cache>,
    position: usize,
    next: u32,
    result: Vec<u32>,
    ended: bool,
    done: bool,
}

impl Model {
    pub(super) fn generate_pass(
        &self,
        prompts: &[Vec<u32>],
        max_new: usize,
        ends: &[u32],
    ) -> Result<Vec<(Vec<u32>, bool)>, Error> {
        let mut results = Vec::new();
        for group in prompts.chunks(ROWS) {
            let longest = group.iter().map(Vec::len).max().unwrap_or(0);
            let rotation = self.rotation((longest + max_new).next_multiple_of(LENGTH));
            let mut slots = group.iter().map(|p| self.read(p, max_new)).collect::<Result<Vec<_>, _>>()?;
            for _ in 0..max_new {
                slots.iter_mut().for_each(|slot| slot.accept(ends));
                if slots.iter().all(|slot| slot.done) {
                    break;
                }
                if slots.iter().any(|slot| !slot.done && slot.result.len() < max_new) {
                    self.step(&mut slots, &rotation)?;
                }
            }
            results.extend(slots.into_iter().map(|slot| (slot.result, slot.ended)));
        }
        Ok(results)
    }

    /// Reads a prompt alone. Its caches have room for `max_new` tokens more from the start: the memory plan counts that.
    fn read(&self, prompt: &[u32], max_new: usize) -> Result<Slot, Error> {
        let batch = Batch { tokens: prompt.to_vec(), targets: Vec::new(), starts: vec![0] };
        self.check(&batch)?;
        let mut caches = Vec::new();
        let (kv_heads, dim) = (self.spec().kv_heads, self.spec().head_dim);
        let last = vec![prompt.len() as u32 - 1];
        let mut passage = Passage::new(self, batch.tokens, &batch.starts, last, Vec::new());
        passage.forward(self, 0, false)?;
        for bucket in 1..=self.spec().layers {
            passage.forward(self, bucket, false)?;
            let (keys, values) = passage.newest().keys_and_values();
            // [kv heads, padded, D] -> [positions, kv heads * D]
            let by_position = |flat: &Tensor| -> Vec<f32> {
                let planes = flat.view([kv_heads as i64, -1, dim as i64]);
                let rows = planes.transpose(0, 1).narrow(0, 0, prompt.len() as i64).to_kind(Kind::Float).contiguous();
                let rows = elements::<f32>(&rows);
                let mut cache = Vec::with_capacity(rows.len() + max_new * kv_heads * dim);
                cache.extend_from_slice(rows);
                cache
            };
            caches.push(Cache { keys: by_position(keys), values: by_position(values) });
        }
        let mut logits = self.head().logits_of(&passage.last(), &self.pool)?;
        let next = first_choices(&mut logits)[0];
        Ok(Slot { caches, position: prompt.len(), next, result: Vec::new(), ended: false, done: false })
    }

    /// One token more for every slot that is not done.
    fn step(&self, slots: &mut [Slot], rotation: &Rotation) -> Result<(), Error> {
        let (spec, pool, wide) = (self.spec(), &self.pool, wide(self.compute()));
        let mut ids: Vec<u32> = slots.iter().map(|slot| slot.next).collect();
        ids.resize(ROWS, 0);
        let mut embedded = pool.take(wide, &[ROWS, spec.hidden]);
        rows::look_up(&self.embedding(), &ids, &mut embedded);
        let (mut residual, mut mlp) = self.block(0).step(0, Stream::Embedded(embedded), slots, rotation, self)?;
        for layer in 1..spec.layers {
            let stream = Stream::Within { residual: &residual, mlp, bias: self.block(layer - 1).down_bias() };
            (residual, mlp) = self.block(layer).step(layer, stream, slots, rotation, self)?;
        }
        let last = Last { residual: &residual, mlp: &mlp, bias: self.block(spec.layers - 1).down_bias() };
        let choices = first_choices(&mut *self.head().logits_of(&last, pool)?);
        for (slot, choice) in slots.iter_mut().zip(choices) {
            slot.next = choice;
            slot.position += usize::from(!slot.done);
        }
        Ok(())
    }
}

impl Slot {
    /// Takes the next token into the result, or ends there.
    fn accept(&mut self, ends: &[u32]) {
        if self.done {
            return;
        }
        self.ended = ends.contains(&self.next);
        self.done = self.ended;
        if !self.done {
            self.result.push(self.next);
        }
    }
}

impl Block<'_> {
    /// The block for one more position of every slot: the stream within the block, and what its MLP adds.
    fn step(
        &self,
        layer: usize,
        stream: Stream<'_>,
        slots: &mut [Slot],
        rotation: &Rotation,
        model: &Model,
    ) -> Result<(Buffer, Buffer), Error> {
        let (pool, wide, compute) = (&model.pool, wide(model.compute()), model.compute());
        let hidden = self.spec.hidden;
        let norm = |input: &Tensor, addend: Option<Addend<'_>>, weight: &Tensor| {
            let (mut rstd, mut output) = (pool.take(wide, &[ROWS]), pool.take(compute, &[ROWS, hidden]));
            let mut sum = pool.take(wide, &[ROWS, hidden]);
            let residual = addend.is_some().then_some(&mut *sum);
            norm::forward(
                input,
                addend,
                weight,
                self.spec.norm_eps,
                Normed { residual, rstd: &mut rstd, output: &mut output },
            );
            (sum, output)
        };
        let (input, normed) = match stream {
            Stream::Embedded(input) => {
                let (_, normed) = norm(&input, None, &self.input_norm.weight);
                (input, normed)
            }
            Stream::Within { residual, mlp, bias } => {
                norm(residual, Some(Addend { output: &mlp, bias: bias.as_ref() }), &self.input_norm.weight)
            }
        };
        let mut projections = Vec::new();
        for linear in &self.qkv {
            projections.push(linear.forward(&normed, pool)?);
        }
        let mut attended = pool.take_zero(compute, &[ROWS, self.query_heads().width()]);
        match compute {
            Kind::Float => self.attend::<f32>(layer, &projections, slots, rotation, &mut attended),
            Kind::BFloat16 => self.attend::<bf16>(layer, &projections, slots, rotation, &mut attended),
            other => return Err(Error::Batch(format!("decoding is done in fp32 or bf16, not in {other:?}"))),
        }
        let attention = self.output.forward(&attended, pool)?;
        let addend = Addend { output: &attention, bias: self.output.bias.as_ref() };
        let (middle, normed) = norm(&input, Some(addend), &self.mlp_norm.weight);
        let mut gate_up = Vec::new();
        for linear in &self.gate_up {
            gate_up.push(linear.forward(&normed, pool)?);
        }
        let mut activated = pool.take(compute, &[ROWS, self.spec.intermediate]);
        swiglu::forward(super::block::gate_and_up(&mut gate_up), self.gate_up_bias(), &mut activated);
        let mlp = self.down.forward(&activated, pool)?;
        Ok((middle, mlp))
    }

    /// Adds the new position's keys and values to the caches and attends to all of them.
    fn attend<C: Narrow>(
        &self,
        layer: usize,
        projections: &[Buffer],
        slots: &mut [Slot],
        rotation: &Rotation,
        output: &mut Tensor,
    ) {
        let (q_heads, k_heads) = (self.query_heads(), self.key_heads());
        let output = elements_mut::<C>(output).chunks_exact_mut(q_heads.width());
        for (row, (slot, output)) in slots.iter_mut().zip(output).enumerate() {
            if slot.done {
                continue;
            }
            let [q, k, v] = self.parts().map(|part| {
                let columns = self.columns(&part, projections);
                let from = row * columns.matrix.size()[1] as usize + columns.first;
                let bias = columns.bias.map(elements::<C>);
                move |width: usize| -> Vec<f32> {
                    let values = &elements::<C>(columns.matrix)[from..from + width];
                    let bias = |i: usize| bias.map_or(0.0, |b| b[i].load());
                    values.iter().enumerate().map(|(i, v)| v.load() + bias(i)).collect()
                }
            });
            let (q_norm, k_norm) = self.qk_norm.as_ref().map(|(q, k)| (&q.weight, &k.weight)).unzip();
            let (mut q, mut k, mut v) = (q(q_heads.width()), k(k_heads.width()), v(k_heads.width()));
            for (values, scale) in [(&mut q, q_norm), (&mut k, k_norm)] {
                for head in values.chunks_exact_mut(q_heads.dim) {
                    turn(head, scale.map(|w| elements::<C>(w)), self.spec.norm_eps as f32, rotation, slot.position);
                }
            }
            // Rounded as matrix products would read them.
            [&mut q, &mut k, &mut v].into_iter().flatten().for_each(|x| *x = C::store(*x).load());
            let cache = &mut slot.caches[layer];
            cache.keys.extend_from_slice(&k);
            cache.values.extend_from_slice(&v);
            let first = self.spec.sliding_window.map_or(0, |w| (slot.position + 1).saturating_sub(w));
            let mut attended = vec![0.0; q_heads.width()];
            let (keys, values) = (&cache.keys[first * k.len()..], &cache.values[first * k.len()..]);
            attend_row(&q, keys, values, q_heads, &mut attended);
            output.iter_mut().zip(attended).for_each(|(o, x)| *o = C::store(x));
        }
    }
}

/// Norm and rotary embedding of one head at `position`.
fn turn<C: Narrow>(head: &mut [f32], scale: Option<&[C]>, eps: f32, rotation: &Rotation, position: usize) {
    if let Some(scale) = scale {
        let rstd = 1.0 / (dot(head, head) / head.len() as f32 + eps).sqrt();
        head.iter_mut().zip(scale).for_each(|(x, w)| *x *= rstd * w.load());
    }
    let half = head.len() / 2;
    let at = position * half..(position + 1) * half;
    let (cos, sin) = (&elements::<f32>(&rotation.cos)[at.clone()], &elements::<f32>(&rotation.sin)[at]);
    let (x, y) = head.split_at_mut(half);
    for (((x, y), c), s) in x.iter_mut().zip(y).zip(cos).zip(sin) {
        (*x, *y) = (*x * c - *y * s, *y * c + *x * s);
    }
}

vectorised! {
    fn attend_row(q: &[f32], keys: &[f32], values: &[f32], heads: Heads, output: &mut [f32]) {
        let (dim, group, stride) = (heads.dim, heads.count / heads.kv, heads.kv * heads.dim);
        let scale = 1.0 / (dim as f32).sqrt();
        let mut scores = vec![0.0f32; keys.len() / stride];
        for (head, (q, out)) in q.chunks_exact(dim).zip(output.chunks_exact_mut(dim)).enumerate() {
            let at = head / group * dim;
            for (score, key) in scores.iter_mut().zip(keys.chunks_exact(stride)) {
                *score = dot(q, &key[at..at + dim]) * scale;
            }
            let most = max(&scores);
            let mut sum = 0.0;
            for score in &mut scores {
                *score = exp(*score - most);
                sum += *score;
            }
            for (score, value) in scores.iter().zip(values.chunks_exact(stride)) {
                let share = score / sum;
                out.iter_mut().zip(&value[at..at + dim]).for_each(|(o, v)| *o += share * v);
            }
        }
    }
}
