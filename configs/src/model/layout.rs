//! Flat buckets, their chunks and who owns them: pure functions of the model and of the number of workers.
//!
//! A *bucket* is one flat parameter tensor: the embedding, each block, the head. A *chunk* is 65,536 consecutive
//! elements of a bucket (the last one may be shorter): the unit of ownership, of norm partials and of checkpoint ranges.

use super::spec::ModelSpec;
use std::ops::Range;

/// Elements per chunk.
pub const CHUNK: usize = 65_536;

/// One parameter tensor inside a bucket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSlot {
    /// Hugging Face name, for example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[rows, columns]` for matrices, `[n]` for biases and norms.
    pub shape: Vec<usize>,
    /// First element within the bucket.
    pub offset: usize,
}

impl TensorSlot {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of the bucket that this tensor occupies.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.elements()
    }

    /// Weight decay applies to matrices only; norms and biases are skipped.
    pub fn decays(&self) -> bool {
        self.shape.len() > 1
    }
}

/// One flat parameter tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// `embedding`, `block.<layer>` or `head`.
    pub name: String,
    /// In ascending order of offset, without gaps.
    pub tensors: Vec<TensorSlot>,
    /// Elements in all.
    pub elements: usize,
}

impl Bucket {
    fn new(name: String) -> Self {
        Bucket { name, tensors: Vec::new(), elements: 0 }
    }

    fn push(&mut self, name: String, shape: &[usize]) {
        let slot = TensorSlot { name, shape: shape.to_vec(), offset: self.elements };
        self.elements += slot.elements();
        self.tensors.push(slot);
    }

    pub fn chunks(&self) -> usize {
        self.elements.div_ceil(CHUNK)
    }

    /// Elements of chunk `chunk`; the last chunk may be shorter than [`CHUNK`].
    pub fn chunk(&self, chunk: usize) -> Range<usize> {
        chunk * CHUNK..((chunk + 1) * CHUNK).min(self.elements)
    }

    /// The tensor whose Hugging Face name ends in `suffix`.
    pub fn tensor(&self, suffix: &str) -> Option<&TensorSlot> {
        self.tensors.iter().find(|t| t.name.ends_with(suffix))
    }
}

/// All buckets of a model, in forward order: embedding, blocks, head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub buckets: Vec<Bucket>,
}

impl Layout {
    pub fn new(spec: &ModelSpec) -> Self {
        let (h, f, d) = (spec.hidden, spec.intermediate, spec.head_dim);
        let (q, kv) = (spec.heads * d, spec.kv_heads * d);
        let mut embedding = Bucket::new("embedding".into());
        embedding.push("model.embed_tokens.weight".into(), &[spec.vocab, h]);
        let mut buckets = vec![embedding];
        for layer in 0..spec.layers {
            let mut block = Bucket::new(format!("block.{layer}"));
            let mut push = |name: &str, shape: &[usize]| block.push(format!("model.layers.{layer}.{name}"), shape);
            push("input_layernorm.weight", &[h]);
            for (name, rows, columns, bias) in [
                ("q_proj", q, h, spec.qkv_bias),
                ("k_proj", kv, h, spec.qkv_bias),
                ("v_proj", kv, h, spec.qkv_bias),
                ("o_proj", h, q, spec.o_bias),
            ] {
                push(&format!("self_attn.{name}.weight"), &[rows, columns]);
                if bias {
                    push(&format!("self_attn.{name}.bias"), &[rows]);
                }
            }
            if spec.qk_norm {
                push("self_attn.q_norm.weight", &[d]);
                push("self_attn.k_norm.weight", &[d]);
            }
            push("post_attention_layernorm.weight", &[h]);
            for (name, rows, columns) in [("gate_proj", f, h), ("up_proj", f, h), ("down_proj", h, f)] {
                push(&format!("mlp.{name}.weight"), &[rows, columns]);
                if spec.mlp_bias {
                    push(&format!("mlp.{name}.bias"), &[rows]);
                }
            }
            buckets.push(block);
        }
        let mut head = Bucket::new("head".into());
        head.push("model.norm.weight".into(), &[h]);
        if !spec.tied {
            head.push("lm_head.weight".into(), &[spec.vocab, h]);
        }
        buckets.push(head);
        Layout { buckets }
    }

    /// Parameters in all; a tied head counts once.
    pub fn parameters(&self) -> usize {
        self.buckets.iter().map(|b| b.elements).sum()
    }

    /// Every tensor with the index of its bucket, in bucket order.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorSlot)> {
        self.buckets.iter().enumerate().flat_map(|(index, bucket)| bucket.tensors.iter().map(move |t| (index, t)))
    }

    /// For each bucket the range of chunks that `rank` of `world` owns. Ranges tile every bucket; what a bucket cannot
    /// divide evenly is made up for in the next ones, so that all ranks own about equally many elements.
    pub fn shard(&self, rank: usize, world: usize) -> Vec<Range<usize>> {
        assert!(rank < world, "rank {rank} lies outside a world of {world}");
        // given[r]: elements of the buckets so far that the ranks below r own; r / world of them would be fair.
        let (mut given, mut total) = (vec![0; world + 1], 0);
        self.buckets
            .iter()
            .map(|bucket| {
                total += bucket.elements;
                let mut bounds = vec![0; world + 1];
                for r in 1..=world {
                    let fair = (r * total / world).saturating_sub(given[r]).min(bucket.elements);
                    let nearest = if r == world { bucket.chunks() } else { (fair + CHUNK / 2) / CHUNK };
                    bounds[r] = nearest.clamp(bounds[r - 1], bucket.chunks());
                    given[r] += (bounds[r] * CHUNK).min(bucket.elements);
                }
                bounds[rank]..bounds[rank + 1]
            })
            .collect()
    }

    /// The same shard in elements: for each bucket the elements that `rank` of `world` owns.
    pub fn shard_elements(&self, rank: usize, world: usize) -> Vec<Range<usize>> {
        let clip = |bucket: &Bucket, chunk: usize| (chunk * CHUNK).min(bucket.elements);
        self.shard(rank, world)
            .into_iter()
            .zip(&self.buckets)
            .map(|(range, bucket)| clip(bucket, range.start)..clip(bucket, range.end))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::spec::tests::tiny;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn shards_tile_every_bucket_and_are_about_equal(
            world in 1usize..17, layers in 1usize..5, hidden in 1usize..9, vocab in 1usize..5000, tied: bool,
        ) {
            let spec = ModelSpec { layers, hidden: hidden * 64, vocab, tied, ..tiny() };
            let layout = Layout::new(&spec);
            let shards: Vec<_> = (0..world).map(|rank| layout.shard(rank, world)).collect();
            for (index, bucket) in layout.buckets.iter().enumerate() {
                let mut next = 0;
                for shard in &shards {
                    prop_assert_eq!(shard[index].start, next);
                    next = shard[index].end;
                }
                prop_assert_eq!(next, bucket.chunks());
            }
            let owned = |rank: usize| layout.shard_elements(rank, world).iter().map(|r| r.len()).sum::<usize>();
            let (most, least) = ((0..world).map(owned).max().unwrap(), (0..world).map(owned).min().unwrap());
            prop_assert!(most - least <= 3 * CHUNK, "{} to {} elements", least, most);
            let elements: usize = (0..world).flat_map(|r| layout.shard_elements(r, world)).map(|r| r.len()).sum();
            prop_assert_eq!(elements, layout.parameters());
        }
    }
}
