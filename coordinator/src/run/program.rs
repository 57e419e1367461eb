//! What a run does, as a sequence of items, and each item as the directive that tells the workers.

use super::assign::{assign, Shares};
use super::plan::{Plan, StepPlan, Worst};
use super::schedule::LearningRate;
use super::units::{Unit, Units};
use std::collections::VecDeque;
use std::sync::Arc;
use unisono_configs::run::Assignment;
use unisono_proto::v1::directive::Body;
use unisono_proto::v1::{Checkpoint, Evaluate, Finish, Generate, Step, Suite};

/// The work of a run.
#[derive(Clone)]
pub enum Program {
    Train(Training),
    /// One pass over the units of each suite.
    Evaluate(Vec<(Suite, Units)>),
    Generate {
        units: Units,
        max_new_tokens: u32,
        end_tokens: Vec<u32>,
    },
}

#[derive(Clone)]
pub struct Training {
    pub plan: Arc<Plan>,
    pub rate: LearningRate,
    pub validation: Units,
    pub test: Units,
    /// Steps between validations; 0: only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints; 0: only at the end.
    pub checkpoint_every: u64,
    /// Steps that are committed already.
    pub start: u64,
    /// Steps whose rows are all tokenized when the run starts: those up to it can be dealt.
    pub prepared: u64,
}

/// One thing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    Step(u64),
    /// The micro-batches of a step, each tried by itself.
    Probe(u64),
    /// After `step` committed steps.
    Evaluate {
        suite: Suite,
        step: u64,
    },
    Checkpoint(u64),
    /// One of the parts that the prompts are continued in, from 0: each worker's answer is one message.
    Generate(u32),
    Finish,
}

/// What an item's answers must add up to.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Rank that computes each micro-batch.
    pub owners: Vec<u32>,
    /// Targets in each micro-batch.
    pub targets: Vec<u64>,
    /// Tokens in each micro-batch.
    pub tokens: Vec<u64>,
    /// Task of each unit; empty for a step.
    pub tasks: Vec<u32>,
    /// Prompts in each unit; empty unless prompts are continued.
    pub prompts: Vec<usize>,
    pub examples: u64,
    pub learning_rate: f64,
}

impl Program {
    /// The largest that any item brings.
    pub fn worst(&self) -> Worst {
        match self {
            Program::Train(t) => t.plan.worst().join(t.validation.worst()).join(t.test.worst()),
            Program::Evaluate(suites) => suites.iter().fold(Worst::default(), |w, (_, units)| w.join(units.worst())),
            Program::Generate { units, .. } => units.worst(),
        }
    }

    /// Steps planned in all; 0 where nothing is trained.
    pub fn steps(&self) -> u64 {
        match self {
            Program::Train(training) => training.plan.steps(),
            _ => 0,
        }
    }

    /// Steps that can be dealt when the run starts.
    pub fn prepared(&self) -> u64 {
        match self {
            Program::Train(training) => training.prepared,
            _ => 0,
        }
    }

    /// Steps that are committed before the run starts.
    pub fn start(&self) -> u64 {
        match self {
            Program::Train(training) => training.start,
            _ => 0,
        }
    }

    fn units(&self, suite: Suite) -> &Units {
        match self {
            Program::Train(training) if suite == Suite::Test => &training.test,
            Program::Train(training) => &training.validation,
            Program::Evaluate(suites) => {
                &suites.iter().find(|(s, _)| *s == suite).expect("the agenda names suites of the program").1
            }
            Program::Generate { units, .. } => units,
        }
    }

    /// The directive for `item` to ranks of these `speeds`, each one's share in it, and what must come back. A checkpoint's path and
    /// attempt are for the caller to fill in.
    pub fn directive(&self, item: Item, speeds: &[u32], assignment: Assignment, seed: u64) -> Instruction {
        match item {
            Item::Step(step) | Item::Probe(step) => {
                let Program::Train(training) = self else { unreachable!("only a training program has steps") };
                let dealt = training.plan.dealt(step);
                let costs: Vec<u64> = dealt.micro_batches.iter().map(|m| m.cost).collect();
                let shares = assign(assignment, &costs, speeds, step, seed);
                let expected = Expected::of_step(&dealt, &shares, training.rate.at(step));
                let (learning_rate, target_tokens) = (expected.learning_rate, dealt.target_tokens);
                let probe = matches!(item, Item::Probe(_));
                let body = Body::Step(Step { step, learning_rate, target_tokens, probe, ..Step::default() });
                Instruction { body, shares, expected }
            }
            Item::Evaluate { suite, step } => {
                let units = self.units(suite);
                let shares = assign(assignment, &units.costs(), speeds, step, seed);
                let expected = Expected::of_units(units, &shares);
                let body = Body::Evaluate(Evaluate { suite: suite.into(), ..Evaluate::default() });
                Instruction { body, shares, expected }
            }
            Item::Generate(part) => {
                let Program::Generate { units, max_new_tokens, end_tokens } = self else {
                    unreachable!("only a generating program has prompts")
                };
                let range =
                    units.parts(*max_new_tokens).nth(part as usize).expect("the agenda names parts of the program");
                let mut shares = assign(assignment, &units.costs()[range.clone()], speeds, 0, seed);
                shares.iter_mut().flatten().for_each(|unit| *unit += range.start as u32);
                let mut expected = Expected::of_units(units, &shares);
                let prompts =
                    |(index, unit): (usize, &Unit)| if range.contains(&index) { unit.work.rows.len() } else { 0 };
                expected.prompts = units.as_slice().iter().enumerate().map(prompts).collect();
                let (max_new_tokens, end_tokens) = (*max_new_tokens, end_tokens.clone());
                let body = Body::Generate(Generate { max_new_tokens, end_tokens, ..Generate::default() });
                Instruction { body, shares, expected }
            }
            Item::Checkpoint(step) => {
                Instruction::without_shares(Body::Checkpoint(Checkpoint { step, ..Checkpoint::default() }))
            }
            Item::Finish => Instruction::without_shares(Body::Finish(Finish {})),
        }
    }
}

/// A directive for all ranks.
#[derive(Debug, Clone)]
pub struct Instruction {
    /// What all are told alike.
    pub body: Body,
    /// By rank; empty where there is nothing to share.
    pub shares: Shares,
    pub expected: Expected,
}

impl Instruction {
    fn without_shares(body: Body) -> Self {
        Instruction { body, shares: Shares::new(), expected: Expected::nothing() }
    }

    /// What each rank is told, in rank order; without end where there is nothing to share.
    pub fn bodies(self) -> impl Iterator<Item = Body> {
        let (longest, shared) = (self.shares.iter().map(Vec::len).max().unwrap_or(0) as u32, !self.shares.is_empty());
        let (body, mut shares) = (self.body, self.shares.into_iter());
        std::iter::from_fn(move || {
            let share = if shared { shares.next()? } else { Vec::new() };
            let mut body = body.clone();
            let (micro_batches, passes) = match &mut body {
                Body::Step(Step { micro_batches, passes, .. })
                | Body::Evaluate(Evaluate { micro_batches, passes, .. })
                | Body::Generate(Generate { micro_batches, passes, .. }) => (micro_batches, passes),
                Body::Checkpoint(_) | Body::Finish(_) => return Some(body),
            };
            (*micro_batches, *passes) = (share, longest);
            Some(body)
        })
    }
}

impl Expected {
    fn nothing() -> Self {
        Expected {
            owners: Vec::new(),
            targets: Vec::new(),
            tokens: Vec::new(),
            tasks: Vec::new(),
            prompts: Vec::new(),
            examples: 0,
            learning_rate: 0.0,
        }
    }

    fn of_step(step: &StepPlan, shares: &Shares, learning_rate: f64) -> Self {
        Expected {
            owners: owners(shares, step.micro_batches.len()),
            targets: step.micro_batches.iter().map(|m| u64::from(m.targets)).collect(),
            tokens: step.micro_batches.iter().map(|m| u64::from(m.tokens)).collect(),
            examples: step.examples.len() as u64,
            learning_rate,
            ..Expected::nothing()
        }
    }

    fn of_units(units: &Units, shares: &Shares) -> Self {
        let units = units.as_slice();
        Expected {
            owners: owners(shares, units.len()),
            targets: units.iter().map(|u| u64::from(u.work.targets)).collect(),
            tokens: units.iter().map(|u| u64::from(u.work.tokens)).collect(),
            tasks: units.iter().map(|u| u.task).collect(),
            examples: units.iter().map(|u| u.work.rows.len() as u64).sum(),
            ..Expected::nothing()
        }
    }
}

fn owners(shares: &Shares, count: usize) -> Vec<u32> {
    let mut owners = vec![0; count];
    for (rank, share) in (0..).zip(shares) {
        share.iter().for_each(|&m| owners[m as usize] = rank);
    }
    owners
}

/// The items of a program, one after another.
#[derive(Debug, Clone)]
pub struct Agenda {
    due: VecDeque<Item>,
    /// Steps whose items have been put into `due`.
    planned: u64,
}

impl Agenda {
    pub fn new(program: &Program) -> Self {
        let due = match program {
            // All steps were committed before: what is left is what follows the last one's checkpoint.
            Program::Train(training) if training.start >= training.plan.steps() => {
                conclusion(training, training.start).into()
            }
            Program::Train(_) => VecDeque::new(),
            Program::Evaluate(suites) => {
                let items = suites.iter().filter(|(_, units)| !units.is_empty());
                items.map(|&(suite, _)| Item::Evaluate { suite, step: 0 }).chain([Item::Finish]).collect()
            }
            Program::Generate { units, max_new_tokens, .. } => {
                let parts = units.parts(*max_new_tokens).zip(0..).map(|(_, part)| Item::Generate(part));
                parts.chain([Item::Finish]).collect()
            }
        };
        Agenda { due, planned: program.start() }
    }

    /// What follows the update of the program's first step, which was made before: all that belongs to it is due, except for
    /// the validation where that is known.
    pub fn after_step(program: &Program, is_evaluated: impl Fn(u64) -> bool) -> Self {
        let mut agenda = Self::new(program);
        if let (Program::Train(training), step @ 1..) = (program, program.start()) {
            let known = |item: &Item| match *item {
                Item::Step(_) => true,
                Item::Evaluate { suite: Suite::Validation, step } => is_evaluated(step),
                _ => false,
            };
            agenda.due = after(training, step).into_iter().filter(|item| !known(item)).collect();
        }
        agenda
    }

    /// A checkpoint as soon as may be: after the newest step that has been handed out.
    pub fn save_now(&mut self) {
        let after = self.due.iter().any(|item| matches!(item, Item::Checkpoint(_) | Item::Finish));
        if self.planned > 0 && !after {
            self.due.push_back(Item::Checkpoint(self.planned));
        }
    }

    /// The next item; `None` after [`Item::Finish`], and where it is a step beyond `prepared`.
    pub fn next(&mut self, program: &Program, prepared: u64) -> Option<Item> {
        if let (true, Program::Train(training)) = (self.due.is_empty(), program) {
            let steps = training.plan.steps();
            if self.planned < steps {
                self.planned += 1;
                self.due.extend(after(training, self.planned));
            }
        }
        match self.due.front() {
            Some(&Item::Step(step)) if step > prepared => None,
            _ => self.due.pop_front(),
        }
    }

    /// What [`Agenda::next`] would give.
    pub fn peek(&self, program: &Program) -> Option<Item> {
        match (self.due.front(), program) {
            (Some(item), _) => Some(*item),
            (None, Program::Train(t)) if self.planned < t.plan.steps() => Some(Item::Step(self.planned + 1)),
            (None, _) => None,
        }
    }

    /// The step after which the agenda stands, with nothing left of it to do.
    pub fn barrier(&self) -> Option<u64> {
        let step = match self.due.front() {
            None => self.planned,
            Some(&Item::Step(step)) => step - 1,
            Some(_) => 0,
        };
        (step > 0).then_some(step)
    }
}

/// Everything that belongs to `step`.
fn after(training: &Training, step: u64) -> Vec<Item> {
    let last = step == training.plan.steps();
    let due = |every: u64| last || (every > 0 && step.is_multiple_of(every));
    let mut items = vec![Item::Step(step)];
    if due(training.eval_every) && !training.validation.is_empty() {
        items.push(Item::Evaluate { suite: Suite::Validation, step });
    }
    if due(training.checkpoint_every) {
        items.push(Item::Checkpoint(step));
    }
    if last {
        items.extend(conclusion(training, step));
    }
    items
}

/// What follows the last checkpoint.
fn conclusion(training: &Training, step: u64) -> Vec<Item> {
    let test = (!training.test.is_empty()).then_some(Item::Evaluate { suite: Suite::Test, step });
    test.into_iter().chain([Item::Finish]).collect()
}
