//! What the engine's tests share: models with random parameters, a sink for leaves, and the same model once more, written
//! plainly over libtorch's autograd, as the oracle.
#![allow(dead_code)]

use tch::{Device, Kind, Tensor};
use unisono_configs::model::{Family, Layout, ModelSpec, Rope, RopeScaling};
use unisono_proto::NO_TARGET;
use unisono_worker::model::{BadNumber, Batch, Leaves, Model};

/// Tests run beside one another; each computes on its own thread.
pub fn one_thread() {
    tch::set_num_threads(1);
}

/// A small reproducible generator.
pub struct Random(pub u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }
    pub fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }
    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f64 {
        self.bits() as f64 / (1u64 << 30) as f64 - 1.0
    }
    pub fn vector(&mut self, n: usize, scale: f64) -> Vec<f64> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

pub fn tiny() -> ModelSpec {
    ModelSpec {
        family: Family::Llama,
        vocab: 131,
        hidden: 48,
        intermediate: 80,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 8,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        tied: true,
        max_positions: 2048,
    }
}

/// One of each kind of model.
pub fn specs() -> Vec<(&'static str, ModelSpec)> {
    let llama3 = RopeScaling::Llama3 { factor: 8.0, low_frequency: 1.0, high_frequency: 4.0, original_positions: 32.0 };
    vec![
        ("llama tied", tiny()),
        ("llama3 rope", ModelSpec { tied: false, rope: Rope { theta: 500_000.0, scaling: llama3 }, ..tiny() }),
        ("all biases", ModelSpec { qkv_bias: true, o_bias: true, mlp_bias: true, ..tiny() }),
        ("window", ModelSpec { family: Family::Mistral, sliding_window: Some(7), tied: false, ..tiny() }),
        ("qwen2", ModelSpec { family: Family::Qwen2, qkv_bias: true, ..tiny() }),
        ("qwen3", ModelSpec { family: Family::Qwen3, qk_norm: true, head_dim: 16, ..tiny() }),
        ("qwen3 with biases", ModelSpec { qk_norm: true, qkv_bias: true, o_bias: true, kv_heads: 6, ..tiny() }),
    ]
}

/// Flat fp64 parameters whose values fp32 holds exactly; norms around 1, everything else around 0.
pub fn parameters(spec: &ModelSpec, seed: u64) -> Vec<Tensor> {
    let mut random = Random(seed);
    let layout = Layout::new(spec);
    let bucket = |bucket: &unisono_configs::model::Bucket| {
        let mut flat = Vec::with_capacity(bucket.elements);
        for slot in &bucket.tensors {
            let (center, scale) = match slot.shape.as_slice() {
                [_, inputs] => (0.0, 2.0 / (*inputs as f64).sqrt()),
                _ if slot.name.ends_with("bias") => (0.0, 0.5),
                _ => (1.0, 0.5),
            };
            flat.extend(random.vector(slot.elements(), scale).iter().map(|v| (v + center) as f32 as f64));
        }
        Tensor::from_slice(&flat)
    };
    layout.buckets.iter().map(bucket).collect()
}

pub fn model(spec: &ModelSpec, parameters: &[Tensor], compute: Kind) -> Model {
    let mut model = Model::new(spec.clone(), compute, Device::Cpu);
    for (index, flat) in parameters.iter().enumerate() {
        model.bucket_mut(index).copy_(flat);
    }
    model
}

/// Documents of these lengths with random tokens; about `share` of the tokens have a target, the last of each document
/// does not.
pub fn batch(vocab: usize, lengths: &[usize], share: f64, seed: u64) -> Batch {
    let mut random = Random(seed);
    let (mut tokens, mut targets, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for &length in lengths {
        starts.push(tokens.len() as u32);
        let document: Vec<u32> = (0..length).map(|_| random.below(vocab) as u32).collect();
        for i in 0..length {
            let chosen = i + 1 < length && (random.unit() + 1.0) / 2.0 < share;
            targets.push(if chosen { document[i + 1] } else { NO_TARGET });
        }
        tokens.extend(document);
    }
    Batch { tokens, targets, starts }
}

pub fn targets(batch: &Batch) -> usize {
    batch.targets.iter().filter(|t| **t != NO_TARGET).count()
}

/// Adds all leaves up in fp64.
pub struct Collected {
    pub buckets: Vec<Tensor>,
    /// Kinds of the dense leaves, in order.
    pub kinds: Vec<Kind>,
}

impl Collected {
    pub fn new(layout: &Layout) -> Self {
        let zeros =
            |b: &unisono_configs::model::Bucket| Tensor::zeros([b.elements as i64], (Kind::Double, Device::Cpu));
        Collected { buckets: layout.buckets.iter().map(zeros).collect(), kinds: Vec::new() }
    }
}

impl Leaves for Collected {
    fn dense(&mut self, bucket: usize, offset: usize, gradient: &Tensor) -> Result<(), BadNumber> {
        assert!(gradient.is_contiguous());
        self.kinds.push(gradient.kind());
        let mut place = self.buckets[bucket].narrow(0, offset as i64, gradient.numel() as i64);
        let _ = place.g_add_(&gradient.view([-1]));
        Ok(())
    }

    fn rows(&mut self, bucket: usize, offset: usize, rows: &[u32], gradient: &Tensor) -> Result<(), BadNumber> {
        assert!(gradient.is_contiguous() && rows.windows(2).all(|pair| pair[0] < pair[1]));
        let width = gradient.size()[1];
        for (index, &row) in rows.iter().enumerate() {
            let mut place = self.buckets[bucket].narrow(0, offset as i64 + row as i64 * width, width);
            let _ = place.g_add_(&gradient.get(index as i64));
        }
        Ok(())
    }
}

/// Relative L2 distance of `found` from `exact`; the plain distance where that is zero.
pub fn distance(found: &Tensor, exact: &Tensor) -> f64 {
    let norm = |t: &Tensor| t.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]).sqrt();
    let exact = exact.to_kind(Kind::Double).reshape([-1]);
    let difference = norm(&(found.to_kind(Kind::Double).reshape([-1]) - &exact));
    match norm(&exact) {
        0.0 => difference,
        size => difference / size,
    }
}

/// Loss sum of one document and gradients of `scale` times it, added to the parameters' `grad`, by autograd.
pub struct Oracle {
    spec: ModelSpec,
    layout: Layout,
    pub leaves: Vec<Tensor>,
}

impl Oracle {
    pub fn new(spec: &ModelSpec, parameters: &[Tensor]) -> Self {
        let leaves = parameters.iter().map(|p| p.copy().set_requires_grad(true)).collect();
        Oracle { spec: spec.clone(), layout: Layout::new(spec), leaves }
    }

    fn find(&self, bucket: usize, suffix: &str) -> Option<Tensor> {
        let slot = self.layout.buckets[bucket].tensor(suffix)?;
        let shape: Vec<i64> = slot.shape.iter().map(|&n| n as i64).collect();
        Some(self.leaves[bucket].narrow(0, slot.offset as i64, slot.elements() as i64).view(shape.as_slice()))
    }

    fn linear(&self, x: &Tensor, bucket: usize, name: &str) -> Tensor {
        let weight = self.find(bucket, &format!("{name}.weight")).unwrap();
        x.linear(&weight, self.find(bucket, &format!("{name}.bias")))
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        x * (x.square().mean_dim([-1i64].as_slice(), true, Kind::Double) + self.spec.norm_eps).rsqrt() * weight
    }

    fn rotate(&self, x: &Tensor) -> Tensor {
        let (length, dim) = (x.size()[0], self.spec.head_dim as i64);
        let frequencies: Vec<f32> =
            self.spec.rope.inverse_frequencies(dim as usize).iter().map(|&f| f as f32).collect();
        let positions = Tensor::arange(length, (Kind::Float, Device::Cpu));
        let angles = positions.outer(&Tensor::from_slice(&frequencies)).to_kind(Kind::Double);
        let angles = Tensor::cat(&[&angles, &angles], -1).unsqueeze(1);
        let halves = x.chunk(2, -1);
        let turned = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        x * angles.cos() + turned * angles.sin()
    }

    /// Logits of one document: `[length, V]`.
    pub fn logits(&self, tokens: &[u32]) -> Tensor {
        let (spec, length) = (&self.spec, tokens.len() as i64);
        let ids = Tensor::from_slice(&tokens.iter().map(|&t| t as i64).collect::<Vec<_>>());
        let embedding = self.find(0, "embed_tokens.weight").unwrap();
        let mut x = embedding.index_select(0, &ids);
        let positions = Tensor::arange(length, (Kind::Int64, Device::Cpu));
        let age = positions.unsqueeze(1) - positions.unsqueeze(0);
        let blind = age.lt(0).logical_or(&age.ge(spec.sliding_window.map_or(i64::MAX, |w| w as i64)));
        for bucket in 1..=spec.layers {
            let normed = self.norm(&x, &self.find(bucket, "input_layernorm.weight").unwrap());
            let heads = |name: &str, count: usize| {
                self.linear(&normed, bucket, name).view([length, count as i64, spec.head_dim as i64])
            };
            let (mut q, mut k, v) =
                (heads("q_proj", spec.heads), heads("k_proj", spec.kv_heads), heads("v_proj", spec.kv_heads));
            if spec.qk_norm {
                q = self.norm(&q, &self.find(bucket, "q_norm.weight").unwrap());
                k = self.norm(&k, &self.find(bucket, "k_norm.weight").unwrap());
            }
            let group = (spec.heads / spec.kv_heads) as i64;
            let expand = |t: &Tensor| t.repeat_interleave_self_int(group, 1, None).transpose(0, 1);
            let (q, k, v) = (self.rotate(&q).transpose(0, 1), expand(&self.rotate(&k)), expand(&v));
            let scores = q.matmul(&k.transpose(1, 2)) / (spec.head_dim as f64).sqrt();
            let p = scores.masked_fill(&blind, f64::NEG_INFINITY).softmax(-1, Kind::Double);
            let attended = p.matmul(&v).transpose(0, 1).reshape([length, -1]);
            x = &x + self.linear(&attended, bucket, "o_proj");
            let normed = self.norm(&x, &self.find(bucket, "post_attention_layernorm.weight").unwrap());
            let gated = self.linear(&normed, bucket, "gate_proj").silu() * self.linear(&normed, bucket, "up_proj");
            x = &x + self.linear(&gated, bucket, "down_proj");
        }
        let head = spec.layers + 1;
        let weight = self.find(head, "lm_head.weight").unwrap_or(embedding);
        self.norm(&x, &self.find(head, "model.norm.weight").unwrap()).linear(&weight, None::<Tensor>)
    }

    /// Loss sum of a batch, each document alone; gradients of `scale` times it are in `leaves[..].grad()`.
    pub fn backward(&self, batch: &Batch, scale: f64) -> f64 {
        let mut sum = 0.0;
        for (index, &start) in batch.starts.iter().enumerate() {
            let end = batch.starts.get(index + 1).map_or(batch.tokens.len(), |&e| e as usize);
            let range = start as usize..end;
            let rows: Vec<i64> = (0..range.len())
                .filter(|&i| batch.targets[start as usize + i] != NO_TARGET)
                .map(|i| i as i64)
                .collect();
            if rows.is_empty() {
                continue;
            }
            let targets: Vec<i64> = rows.iter().map(|&i| batch.targets[start as usize + i as usize] as i64).collect();
            let log_p = self
                .logits(&batch.tokens[range])
                .index_select(0, &Tensor::from_slice(&rows))
                .log_softmax(-1, Kind::Double);
            let loss = -log_p.gather(1, &Tensor::from_slice(&targets).unsqueeze(1), false).sum(Kind::Double);
            sum += loss.double_value(&[]);
            (loss * scale).backward();
        }
        sum
    }
}
