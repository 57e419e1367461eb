//! Examples side by side in one micro-batch, without padding between them.

use super::Example;
use bytes::Bytes;
use unisono_proto::v1::{BatchKey, MicroBatch};
use unisono_proto::{put_u32s, NO_TARGET};

/// A packed row of documents as the wire carries it: little-endian u32.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// Tokens fed: every token of a document but its last.
    pub tokens: Bytes,
    /// For each token fed the one after it where that belongs to the completion, else [`NO_TARGET`].
    pub targets: Bytes,
    /// First token of each document.
    pub starts: Bytes,
}

impl Packed {
    pub fn into_micro_batch(self, key: BatchKey) -> MicroBatch {
        MicroBatch { key: Some(key), tokens: self.tokens, targets: self.targets, starts: self.starts }
    }
}

/// Packs `examples` in the order given.
pub fn pack(examples: &[&Example]) -> Packed {
    let fed: usize = examples.iter().map(|e| e.inputs()).sum();
    let mut tokens = Vec::with_capacity(fed * 4);
    let mut targets = Vec::with_capacity(fed * 4);
    let mut starts = Vec::with_capacity(examples.len() * 4);
    let mut start = 0;
    for example in examples {
        put_u32s(&mut starts, &[start]);
        put_u32s(&mut tokens, &example.tokens[..example.inputs()]);
        let asked = example.first_target();
        put_u32s(&mut targets, &vec![NO_TARGET; asked - 1]);
        let mut from = asked;
        for gap in &example.gaps {
            let (begin, end) = ((gap.start as usize).max(from), gap.end as usize);
            put_u32s(&mut targets, &example.tokens[from..begin]);
            put_u32s(&mut targets, &vec![NO_TARGET; end - begin]);
            from = end;
        }
        put_u32s(&mut targets, &example.tokens[from..]);
        start += example.inputs() as u32;
    }
    Packed { tokens: tokens.into(), targets: targets.into(), starts: starts.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use unisono_proto::get_u32s;

    fn example() -> impl Strategy<Value = Example> {
        (2usize..40, any::<u32>(), 0..5u32).prop_map(|(length, seed, task)| {
            let tokens: Vec<u32> = (0..length as u32).map(|i| (seed.wrapping_add(i * 7919)) % 1000).collect();
            let prompt = seed % length as u32;
            // Every third token, but neither the first of the completion nor the last.
            let gaps = (prompt + 1..length as u32 - 1).filter(|at| seed % 2 == 0 && at % 3 == 0).map(|at| at..at + 1);
            Example { task, row: 0, prompt, gaps: gaps.collect(), tokens: tokens.into() }
        })
    }

    proptest! {
        #[test]
        fn unpacking_gives_the_examples_back(examples in prop::collection::vec(example(), 1..20)) {
            let packed = pack(&examples.iter().collect::<Vec<_>>());
            let (tokens, targets) = (get_u32s(&packed.tokens).unwrap(), get_u32s(&packed.targets).unwrap());
            let starts = get_u32s(&packed.starts).unwrap();
            prop_assert_eq!(tokens.len(), targets.len());
            prop_assert_eq!(starts.len(), examples.len());
            let asked = targets.iter().filter(|&&t| t != NO_TARGET).count();
            prop_assert_eq!(asked, examples.iter().map(Example::targets).sum::<usize>());
            for (i, example) in examples.iter().enumerate() {
                let begin = starts[i] as usize;
                let end = starts.get(i + 1).map_or(tokens.len(), |&s| s as usize);
                prop_assert_eq!(&tokens[begin..end], &example.tokens[..example.tokens.len() - 1]);
                for (at, &target) in targets[begin..end].iter().enumerate() {
                    let predicted = at + 1;
                    let gap = example.gaps.iter().any(|gap| gap.start as usize == predicted);
                    let asked = predicted >= example.prompt as usize && !gap;
                    let expected = if asked { example.tokens[predicted] } else { NO_TARGET };
                    prop_assert_eq!(target, expected);
                }
            }
        }
    }
}
