//! Adding up what the ranks answered to one directive, in the order of micro-batches, never of arrival; and finding the
//! answers that contradict the directive or each other.

use super::event::Continuation;
use super::program::Expected;
use unisono_proto::v1::{Evaluated, GenerateReport, LossPart, StepReport};

/// What is wrong with the answers, and whose fault it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Fault {
    /// Absent where it is not one rank's.
    pub rank: Option<u32>,
    pub message: String,
}

fn fault<T>(rank: u32, message: String) -> Result<T, Fault> {
    Err(Fault { rank: Some(rank), message })
}

/// A step's result.
#[derive(Debug, Clone, PartialEq)]
pub struct StepTotals {
    pub loss: f64,
    pub grad_norm: f64,
    pub tokens: u64,
    pub target_tokens: u64,
    pub rank_tokens: Vec<u64>,
    /// The micro-batch with the highest loss per target.
    pub worst: u32,
}

/// Sums a step: fp64 parts in micro-batch order, divided by the targets. `reports` are in rank order.
pub fn step(expected: &Expected, reports: &[StepReport]) -> Result<StepTotals, Fault> {
    let parts = collect(expected, reports.iter().map(|r| r.parts.as_slice()))?;
    let norm = reports[0].grad_norm;
    if let Some(rank) = reports.iter().position(|r| r.grad_norm.to_bits() != norm.to_bits()) {
        let other = reports[rank].grad_norm;
        return Err(Fault {
            rank: None,
            message: format!(
                "rank 0 has gradient norm {norm:e} and rank {rank} has {other:e}, where every rank must have the same \
                 bits; the ranks no longer hold one state, so start again from the last checkpoint and report this"
            ),
        });
    }
    if !norm.is_finite() {
        return Err(Fault {
            rank: None,
            message: format!(
                "the gradient norm is {norm}; lower train.learning_rate or set train.max_grad_norm, and look at the \
                 rows of this step"
            ),
        });
    }
    let target_tokens: u64 = expected.targets.iter().sum();
    let sum: f64 = parts.iter().map(|p| p.loss_sum).sum();
    let height = |p: &LossPart| p.loss_sum / p.targets.max(1) as f64;
    let worst = parts.iter().max_by(|a, b| height(a).total_cmp(&height(b))).map_or(0, |p| p.micro_batch);
    let mut rank_tokens = vec![0; reports.len()];
    for (&owner, &tokens) in expected.owners.iter().zip(&expected.tokens) {
        rank_tokens[owner as usize] += tokens;
    }
    Ok(StepTotals {
        loss: sum / target_tokens as f64,
        grad_norm: norm,
        tokens: expected.tokens.iter().sum(),
        target_tokens,
        rank_tokens,
        worst,
    })
}

/// Sums an evaluation: one entry for each task, in order, then one for all. `names` are the tasks'.
pub fn evaluation<'a>(
    expected: &Expected,
    reports: impl Iterator<Item = &'a [LossPart]>,
    names: &[String],
    split: &str,
    step: u64,
) -> Result<Vec<Evaluated>, Fault> {
    let parts = collect(expected, reports)?;
    let entry = |task: Option<u32>| {
        let (mut loss, mut targets, mut correct) = (0.0, 0, 0);
        for (part, _) in parts.iter().zip(&expected.tasks).filter(|(_, &t)| task.is_none_or(|task| task == t)) {
            loss += part.loss_sum;
            targets += part.targets;
            correct += part.correct;
        }
        let loss = loss / targets as f64;
        let name = |task| names.get(task as usize).cloned().unwrap_or_else(|| format!("task {task}"));
        Evaluated {
            step,
            split: split.into(),
            task: task.map(name).unwrap_or_default(),
            loss,
            perplexity: loss.exp(),
            token_accuracy: correct as f64 / targets as f64,
            targets,
        }
    };
    let mut tasks = expected.tasks.clone();
    tasks.dedup();
    Ok(tasks.into_iter().map(Some).chain([None]).map(entry).collect())
}

/// Continuations in the order of their prompts.
pub fn continuations(expected: &Expected, reports: &[GenerateReport]) -> Result<Vec<Continuation>, Fault> {
    let mut found: Vec<Vec<Option<Continuation>>> = expected.prompts.iter().map(|&n| vec![None; n]).collect();
    for (rank, report) in (0..).zip(reports) {
        for continuation in &report.continuations {
            let (unit, document) = (continuation.micro_batch, continuation.document);
            let asked = expected.owners.get(unit as usize) == Some(&rank);
            let slot = found.get_mut(unit as usize).and_then(|u| u.get_mut(document as usize)).filter(|_| asked);
            let Some(slot) = slot else {
                return fault(
                    rank,
                    format!("it continued prompt {document} of unit {unit}, which it was not asked for"),
                );
            };
            let Some(tokens) = unisono_proto::get_u32s(&continuation.tokens) else {
                return fault(rank, format!("the continuation of prompt {document} of unit {unit} is cut short"));
            };
            if slot.replace(Continuation { tokens, ended: continuation.ended }).is_some() {
                return fault(rank, format!("it continued prompt {document} of unit {unit} twice"));
            }
        }
    }
    let mut all = Vec::new();
    for (unit, prompts) in found.into_iter().enumerate() {
        for (document, continuation) in prompts.into_iter().enumerate() {
            let Some(continuation) = continuation else {
                let message = format!("it left out prompt {document} of unit {unit}");
                return fault(expected.owners[unit], message);
            };
            all.push(continuation);
        }
    }
    Ok(all)
}

/// Everyone's parts in micro-batch order: each exactly once, from the rank that was asked, over the planned targets.
fn collect<'a>(expected: &Expected, reports: impl Iterator<Item = &'a [LossPart]>) -> Result<Vec<LossPart>, Fault> {
    let mut found: Vec<Option<LossPart>> = vec![None; expected.owners.len()];
    for (rank, parts) in (0..).zip(reports) {
        for part in parts {
            let index = part.micro_batch as usize;
            if expected.owners.get(index) != Some(&rank) {
                return fault(rank, format!("it reported micro-batch {index}, which it was not asked for"));
            }
            if part.targets != expected.targets[index] {
                let (targets, planned) = (part.targets, expected.targets[index]);
                return fault(
                    rank,
                    format!("micro-batch {index} came back with {targets} targets instead of {planned}"),
                );
            }
            if !part.loss_sum.is_finite() {
                let loss = part.loss_sum;
                let advice = "lower train.learning_rate, and look at the rows of this step";
                return fault(rank, format!("the loss of micro-batch {index} is {loss}; {advice}"));
            }
            if found[index].replace(*part).is_some() {
                return fault(rank, format!("it reported micro-batch {index} twice"));
            }
        }
    }
    let missing = found.iter().position(Option::is_none);
    if let Some(index) = missing {
        return fault(expected.owners[index], format!("it did not report micro-batch {index}"));
    }
    Ok(found.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected() -> Expected {
        Expected {
            owners: vec![0, 1, 0],
            targets: vec![2, 3, 5],
            tokens: vec![10, 20, 30],
            tasks: vec![0, 0, 1],
            prompts: vec![],
            examples: 4,
            learning_rate: 0.1,
        }
    }

    fn part(micro_batch: u32, loss_sum: f64, targets: u64) -> LossPart {
        LossPart { micro_batch, loss_sum, targets, correct: 1 }
    }

    fn reports() -> Vec<StepReport> {
        let report = |parts: Vec<LossPart>| StepReport { step: 1, parts, grad_norm: 0.5, ..Default::default() };
        vec![report(vec![part(2, 1e16, 5), part(0, 1.0, 2)]), report(vec![part(1, -1e16, 3)])]
    }

    #[test]
    fn parts_are_added_in_the_order_of_micro_batches() {
        let totals = step(&expected(), &reports()).unwrap();
        // (1 - 1e16) + 1e16 loses the one; any other order keeps or doubles it.
        assert_eq!(totals.loss, ((1.0 - 1e16) + 1e16) / 10.0);
        assert_eq!((totals.tokens, totals.target_tokens, totals.rank_tokens), (60, 10, vec![40, 20]));
    }

    #[test]
    fn contradictions_name_the_rank() {
        let refuse = |change: &dyn Fn(&mut Vec<StepReport>)| {
            let mut reports = reports();
            change(&mut reports);
            step(&expected(), &reports).unwrap_err()
        };
        let twice = refuse(&|r| r[0].parts.push(part(0, 1.0, 2)));
        assert_eq!((twice.rank, twice.message.contains("twice")), (Some(0), true));
        let missing = refuse(&|r| r[1].parts.clear());
        assert_eq!((missing.rank, missing.message.contains("did not report micro-batch 1")), (Some(1), true));
        let foreign = refuse(&|r| r[1].parts.push(part(0, 1.0, 2)));
        assert_eq!((foreign.rank, foreign.message.contains("not asked for")), (Some(1), true));
        assert!(refuse(&|r| r[0].parts[0].targets = 4).message.contains("4 targets instead of 5"));
        assert!(refuse(&|r| r[0].parts[0].loss_sum = f64::NAN).message.contains("is NaN"));
        let norm = refuse(&|r| r[1].grad_norm = f64::from_bits(0.5f64.to_bits() + 1));
        assert!(norm.message.contains("rank 0") && norm.message.contains("rank 1"), "{}", norm.message);
        assert!(refuse(&|r| r.iter_mut().for_each(|r| r.grad_norm = f64::INFINITY)).message.contains("inf"));
    }

    #[test]
    fn evaluations_are_told_by_task_and_together() {
        let reports = reports();
        let names = ["copy".to_string(), "sum".to_string()];
        let parts = reports.iter().map(|r| r.parts.as_slice());
        let told = evaluation(&expected(), parts, &names, "validation", 7).unwrap();
        let found: Vec<(&str, u64)> = told.iter().map(|e| (e.task.as_str(), e.targets)).collect();
        assert_eq!(found, [("copy", 5), ("sum", 5), ("", 10)]);
        assert_eq!(told[1].loss, 1e16 / 5.0);
        assert_eq!(told[2].token_accuracy, 0.3);
    }
}
