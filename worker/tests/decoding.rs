//! Evaluation and greedy decoding against the oracle, and against themselves.
#![allow(clippy::unwrap_used)]

mod support;

use support::*;
use tch::Kind;
use unisono_proto::NO_TARGET;
use unisono_worker::model::Batch;

fn prompts(vocab: usize, lengths: &[usize]) -> Vec<Vec<u32>> {
    let mut random = Random(11);
    lengths.iter().map(|&n| (0..n).map(|_| random.below(vocab) as u32).collect()).collect()
}

#[test]
fn greedy_decoding_takes_the_oracles_first_choices() {
    one_thread();
    for (name, spec) in specs() {
        let parameters = parameters(&spec, 5);
        let oracle = Oracle::new(&spec, &parameters);
        let prompts = prompts(spec.vocab, &[1, 9, 40]);
        let found = model(&spec, &parameters, Kind::Float).generate(&prompts, 12, &[]).unwrap();
        for (prompt, (continuation, ended)) in prompts.iter().zip(found) {
            assert!(!ended);
            let mut tokens = prompt.clone();
            for _ in 0..12 {
                let choice = oracle.logits(&tokens).get(tokens.len() as i64 - 1).argmax(-1, false).int64_value(&[]);
                tokens.push(choice as u32);
            }
            assert_eq!(continuation, tokens[prompt.len()..], "{name}");
        }
    }
}

#[test]
fn a_continuation_does_not_depend_on_its_neighbours() {
    one_thread();
    for compute in [Kind::Float, Kind::BFloat16] {
        for (name, spec) in specs() {
            let model = model(&spec, &parameters(&spec, 5), compute);
            let prompts = prompts(spec.vocab, &[3, 50, 17, 1, 33, 8, 21]);
            let together = model.generate(&prompts, 9, &[7]).unwrap();
            for (prompt, together) in prompts.iter().zip(together) {
                assert_eq!(model.generate(std::slice::from_ref(prompt), 9, &[7]).unwrap()[0], together, "{name}");
            }
        }
    }
}

#[test]
fn an_end_ends_and_is_not_part_of_the_result() {
    one_thread();
    let spec = tiny();
    let model = model(&spec, &parameters(&spec, 5), Kind::Float);
    let prompts = prompts(spec.vocab, &[6, 4]);
    let free = model.generate(&prompts, 8, &[]).unwrap();
    let end = free[0].0[3];
    let first = free[0].0.iter().position(|&t| t == end).unwrap();
    let found = model.generate(&prompts, 8, &[end]).unwrap();
    assert_eq!(found[0], (free[0].0[..first].to_vec(), true));
    assert_eq!(model.generate(&prompts, 0, &[]).unwrap(), [(vec![], false), (vec![], false)]);
}

#[test]
fn evaluation_has_the_loss_of_training_and_counts_first_choices() {
    one_thread();
    for (name, spec) in specs() {
        let parameters = parameters(&spec, 5);
        let oracle = Oracle::new(&spec, &parameters);
        let model = model(&spec, &parameters, Kind::Float);
        let batch = batch(spec.vocab, &[30, 5, 64], 0.5, 9);
        let trained = model.forward_backward(&batch, 1.0, &mut Collected::new(model.layout())).unwrap();
        let found = model.evaluate(&batch).unwrap();
        assert_eq!((found.sum, found.targets), (trained.sum, trained.targets), "{name}");
        // What the oracle would choose becomes the target of every second token.
        let mut ends = batch.starts[1..].to_vec();
        ends.push(batch.tokens.len() as u32);
        let mut chosen = Batch { targets: vec![NO_TARGET; batch.tokens.len()], ..batch.clone() };
        for (&start, end) in batch.starts.iter().zip(ends) {
            let choices = oracle.logits(&batch.tokens[start as usize..end as usize]).argmax(-1, false);
            for row in (start..end).step_by(2) {
                chosen.targets[row as usize] = choices.int64_value(&[(row - start) as i64]) as u32;
            }
        }
        let found = model.evaluate(&chosen).unwrap();
        assert_eq!((found.correct, found.targets as usize), (found.targets, targets(&chosen)), "{name}");
        chosen.targets.iter_mut().filter(|t| **t != NO_TARGET).for_each(|t| *t = (*t + 1) % spec.vocab as u32);
        assert_eq!(model.evaluate(&chosen).unwrap().correct, 0, "{name}");
    }
}

#[test]
fn bad_batches_are_refused() {
    let spec = tiny();
    let model = model(&spec, &parameters(&spec, 5), Kind::Float);
    let good = Batch { tokens: vec![1, 2, 3], targets: vec![2, 3, NO_TARGET], starts: vec![0, 1] };
    assert!(model.evaluate(&good).is_ok());
    for (bad, says) in [
        (Batch { tokens: vec![], targets: vec![], starts: vec![] }, "no tokens"),
        (Batch { targets: vec![1], ..good.clone() }, "1 targets"),
        (Batch { starts: vec![0, 3], ..good.clone() }, "starts"),
        (Batch { starts: vec![1], ..good.clone() }, "starts"),
        (Batch { tokens: vec![1, 131, 2], ..good.clone() }, "token 131"),
        (Batch { targets: vec![500, 1, 1], ..good.clone() }, "target 500"),
    ] {
        let sentence = model.evaluate(&bad).unwrap_err().to_string();
        assert!(sentence.contains(says), "{sentence}");
    }
}
