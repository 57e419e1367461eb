//! Cross-entropy over rows of logits, its gradient in place, and first choices.
//!
//! Logits are `[R, V]` of the compute kind; rows past the targets carry no loss.

use super::form::{self, indices, small_integers, Form};
use super::kernels::{blocks, word, Kernels};
use super::operation::Outcome;
use super::simd::{max, vectorised, Narrow};
use super::softmax::exponentials;
use super::view::elements_mut;
use half::bf16;
use tch::{Kind, Tensor};

/// A loss in nats: known, or still being computed row by row by a device that nobody has waited for.
#[derive(Debug, Default)]
pub struct Loss {
    known: f64,
    pending: Vec<Tensor>,
}

impl Loss {
    pub fn add(&mut self, other: Loss) {
        self.known += other.known;
        self.pending.extend(other.pending);
    }

    /// Whether nobody need wait for it.
    pub fn is_known(&self) -> bool {
        self.pending.is_empty()
    }

    /// The sum, from the first row to the last; waits for the device.
    pub fn sum(self) -> f64 {
        let rows = self.pending.iter().flat_map(|rows| Vec::<f64>::try_from(rows).expect("a vector of f64"));
        rows.fold(self.known, |sum, loss| sum + loss)
    }
}

impl From<f64> for Loss {
    fn from(known: f64) -> Self {
        Loss { known, pending: Vec::new() }
    }
}

impl Outcome for Loss {
    fn left_out() -> Self {
        Loss::default()
    }
}

impl Outcome for (Loss, u64) {
    fn left_out() -> Self {
        (Loss::default(), 0)
    }
}

/// The sum over rows of -log p(target). Replaces the logits by the gradient of `scale` times that sum; rows past `targets`
/// become zero.
pub fn loss_and_gradient(logits: &mut Tensor, targets: &[u32], scale: f64) -> Loss {
    let vocab = logits.size()[1] as usize;
    if let Some(kernels) = Kernels::on(logits) {
        let rows = logits.size()[0] as usize;
        let target = |row: usize| targets.get(row).map_or(-1, |&target| target as i32);
        let targets = small_integers((0..rows).map(target), logits);
        let losses = Tensor::empty([rows as i64], (Kind::Double, logits.device()));
        let name = format!("classify_{}", word(logits.kind()));
        let scale = scale as f32;
        let arguments = [(&*logits).into(), (&targets).into(), scale.into(), (&losses).into(), vocab.into()];
        kernels.launch(&name, blocks(rows, 512), &arguments);
        return Loss { known: 0.0, pending: vec![losses] };
    }
    Loss::from(match Form::of(logits) {
        Form::Single => gradient_rows::<f32>(elements_mut(logits), vocab, targets, scale as f32),
        Form::Brain => gradient_rows::<bf16>(elements_mut(logits), vocab, targets, scale as f32),
        Form::Aten => loss_and_gradient_slow(logits, targets, scale),
    })
}

vectorised! {
    fn gradient_rows<C: Narrow>(logits: &mut [C], vocab: usize, targets: &[u32], scale: f32) -> f64 {
        let mut wide = vec![0.0f32; vocab];
        let mut loss = 0.0f64;
        let (real, padding) = logits.split_at_mut(targets.len() * vocab);
        padding.fill(C::default());
        for (row, &target) in real.chunks_exact_mut(vocab).zip(targets) {
            let most = max(row);
            let chosen = row[target as usize].load();
            let sum = exponentials(row, 1.0, most, &mut wide);
            loss += most as f64 + (sum as f64).ln() - chosen as f64;
            let share = scale / sum;
            for (l, w) in row.iter_mut().zip(&wide) {
                *l = C::store(*w * share);
            }
            row[target as usize] = C::store(wide[target as usize] * share - scale);
        }
        loss
    }
}

/// As [`loss_and_gradient`], in ATen calls of any kind.
pub fn loss_and_gradient_slow(logits: &mut Tensor, targets: &[u32], scale: f64) -> f64 {
    let real = logits.narrow(0, 0, targets.len() as i64);
    let wide = form::wide(real.kind());
    let at = indices(targets.iter().map(|&t| i64::from(t)), &real).unsqueeze(-1);
    let log_p = real.log_softmax(-1, wide);
    let loss = -log_p.gather(-1, &at, false).to_kind(Kind::Double).sum(Kind::Double).double_value(&[]);
    let ids = Tensor::arange(real.size()[1], (Kind::Int64, real.device()));
    // Not by adding at indices, which libtorch refuses on a GPU where it is to be deterministic.
    let gradient = (log_p.exp() - ids.eq_tensor(&at).to_kind(wide)) * scale;
    let _ = logits.zero_();
    logits.narrow(0, 0, targets.len() as i64).copy_(&gradient);
    loss
}

/// The sum over rows of -log p(target), and how many targets are the first choice (the lowest id wins a tie).
pub fn loss_and_correct(logits: &mut Tensor, targets: &[u32]) -> (Loss, u64) {
    let correct = first_choices(logits).iter().zip(targets).filter(|(choice, target)| choice == target).count();
    (loss_and_gradient(logits, targets, 1.0), correct as u64)
}

/// The id of the largest logit of each row; the lowest wins a tie.
pub fn first_choices(logits: &mut Tensor) -> Vec<u32> {
    fn choose<T: Copy + PartialOrd>(logits: &[T], vocab: usize) -> Vec<u32> {
        let best = |row: &[T]| (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32;
        logits.chunks_exact(vocab).map(best).collect()
    }
    let vocab = logits.size()[1] as usize;
    match Form::of(logits) {
        Form::Single => choose::<f32>(elements_mut(logits), vocab),
        Form::Brain => choose::<bf16>(elements_mut(logits), vocab),
        Form::Aten => {
            // An argmax of its own may take any of equals.
            let most = logits.amax([-1i64].as_slice(), true);
            let ids = Tensor::arange(vocab as i64, (Kind::Int64, logits.device()));
            let choices =
                ids.where_self(&logits.eq_tensor(&most), &Tensor::from(vocab as i64).to_device(logits.device()));
            let choices = Vec::<i64>::try_from(choices.amin([-1i64].as_slice(), false)).expect("a vector of i64");
            // A row of NaN has no largest.
            choices.into_iter().map(|id| if id < vocab as i64 { id as u32 } else { 0 }).collect()
        }
    }
}
