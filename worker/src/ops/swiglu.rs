//! `silu(gate) * up` (Shazeer 2020).
//!
//! Shapes: `T` rows, `F` columns. Gate and up are either two tensors `[T, F]` or the halves of one `[T, 2F]`.

use super::form::{self, Form};
use super::kernels::{pack, striding, word, Argument, Kernels};
use super::simd::{exp, vectorised, Narrow};
use super::view::{elements, elements_mut};
use half::bf16;
use tch::{Kind, Tensor};

/// Where gate and up lie: `[gate | up]` in the rows of one tensor, or apart.
pub enum GateUp<'a> {
    Merged(&'a mut Tensor),
    Apart(&'a mut Tensor, &'a mut Tensor),
}

impl GateUp<'_> {
    fn form(&self) -> Form {
        Form::of(self.tensor())
    }

    /// Views of both: `[T, F]` each.
    fn halves(&self) -> (Tensor, Tensor) {
        match self {
            GateUp::Merged(both) => {
                let width = both.size()[1] / 2;
                (both.narrow(1, 0, width), both.narrow(1, width, width))
            }
            GateUp::Apart(gate, up) => (gate.shallow_clone(), up.shallow_clone()),
        }
    }

    fn tensor(&self) -> &Tensor {
        match self {
            GateUp::Merged(both) => both,
            GateUp::Apart(gate, _) => gate,
        }
    }

    /// Calls `row(i, gate, up)` with every row.
    fn rows<C: Narrow>(&mut self, width: usize, mut row: impl FnMut(usize, &mut [C], &mut [C])) {
        match self {
            GateUp::Merged(both) => {
                for (i, both) in elements_mut::<C>(both).chunks_exact_mut(2 * width).enumerate() {
                    let (gate, up) = both.split_at_mut(width);
                    row(i, gate, up);
                }
            }
            GateUp::Apart(gate, up) => {
                let rows =
                    elements_mut::<C>(gate).chunks_exact_mut(width).zip(elements_mut(up).chunks_exact_mut(width));
                for (i, (gate, up)) in rows.enumerate() {
                    row(i, gate, up);
                }
            }
        }
    }
}

/// Biases of gate and up: `[F]` each.
pub type Biases<'a> = Option<(&'a Tensor, &'a Tensor)>;

/// Writes `silu(gate) * up` to `output` `[T, F]`. Biases are added to gate and up first, in place.
pub fn forward(mut input: GateUp<'_>, biases: Biases<'_>, output: &mut Tensor) {
    add_biases(&mut input, biases);
    if let Some(kernels) = Kernels::on(input.tensor()) {
        return launch(kernels, "swiglu_forward", &input, output, Output::Last);
    }
    match input.form() {
        Form::Single => forward_fast::<f32>(&mut input, output),
        Form::Brain => forward_fast::<bf16>(&mut input, output),
        Form::Aten => forward_slow(input, output),
    }
}

/// Where a kernel takes the output or its gradient.
enum Output {
    First,
    Last,
}

/// Both kernels read gate and up beside a third tensor `[T, F]`.
fn launch(kernels: Kernels, name: &str, input: &GateUp<'_>, output: &Tensor, place: Output) {
    let width = output.size()[1] as usize;
    let rows = output.numel() / width.max(1);
    let (gate, up) = input.halves();
    let most = if output.kind() == Kind::BFloat16 { 8 } else { 4 };
    let together = pack(most, width, &[&gate, &up, output]);
    let name = format!("{name}_{}_{together}", word(output.kind()));
    let (gate, up, output, stride) = (Argument::from(&gate), Argument::from(&up), output.into(), gate.stride()[0]);
    let tensors = match place {
        Output::First => [output, gate, up],
        Output::Last => [gate, up, output],
    };
    let shape = [(rows as i64).into(), width.into(), (stride as usize).into()];
    kernels.launch(&name, striding(rows * width / together), &[tensors, shape].concat());
}

/// Few models have these biases; they pay for a pass of their own.
fn add_biases(input: &mut GateUp<'_>, biases: Biases<'_>) {
    if let Some((gate_bias, up_bias)) = biases {
        let (mut gate, mut up) = input.halves();
        let _ = gate.g_add_(gate_bias);
        let _ = up.g_add_(up_bias);
    }
}

fn forward_fast<C: Narrow>(input: &mut GateUp<'_>, output: &mut Tensor) {
    let width = output.size()[1] as usize;
    let output = elements_mut::<C>(output);
    input.rows(width, |i, gate, up| forward_row(gate, up, &mut output[i * width..][..width]));
}

vectorised! {
    fn forward_row<C: Narrow>(gate: &[C], up: &[C], output: &mut [C]) {
        for ((o, g), u) in output.iter_mut().zip(gate).zip(up) {
            let g = g.load();
            *o = C::store(g / (1.0 + exp(-g)) * u.load());
        }
    }
}

/// As [`forward`], in ATen calls of any kind.
pub fn forward_slow(input: GateUp<'_>, output: &mut Tensor) {
    let (gate, up) = input.halves();
    let wide = form::wide(gate.kind());
    output.copy_(&(gate.to_kind(wide).silu() * up.to_kind(wide)));
}

/// Replaces gate and up by their gradients, given that of the output `[T, F]`.
pub fn backward(grad_output: &Tensor, mut input: GateUp<'_>) {
    if let Some(kernels) = Kernels::on(input.tensor()) {
        return launch(kernels, "swiglu_backward", &input, grad_output, Output::First);
    }
    match input.form() {
        Form::Single => backward_fast::<f32>(grad_output, &mut input),
        Form::Brain => backward_fast::<bf16>(grad_output, &mut input),
        Form::Aten => backward_slow(grad_output, input),
    }
}

fn backward_fast<C: Narrow>(grad_output: &Tensor, input: &mut GateUp<'_>) {
    let width = grad_output.size()[1] as usize;
    let grad_output = elements::<C>(grad_output);
    input.rows(width, |i, gate, up| backward_row(&grad_output[i * width..][..width], gate, up));
}

vectorised! {
    fn backward_row<C: Narrow>(grad_output: &[C], gate: &mut [C], up: &mut [C]) {
        for ((dy, gate), up) in grad_output.iter().zip(gate).zip(up) {
            let (dy, g, u) = (dy.load(), gate.load(), up.load());
            let sigmoid = 1.0 / (1.0 + exp(-g));
            let silu = g * sigmoid;
            *up = C::store(dy * silu);
            *gate = C::store(dy * u * (sigmoid + silu * (1.0 - sigmoid)));
        }
    }
}

/// As [`backward`], in ATen calls of any kind.
pub fn backward_slow(grad_output: &Tensor, input: GateUp<'_>) {
    let (mut gate, mut up) = input.halves();
    let wide = form::wide(gate.kind());
    let (wide_gate, grad_output) = (gate.to_kind(wide), grad_output.to_kind(wide));
    let sigmoid = wide_gate.sigmoid();
    let silu = wide_gate * &sigmoid;
    let grad_gate = &grad_output * up.to_kind(wide) * (&sigmoid + &silu * (1.0 - &sigmoid));
    up.copy_(&(grad_output * silu));
    gate.copy_(&grad_gate);
}

#[cfg(test)]
mod tests {
    #[test]
    fn rows_are_visited_once() {
        let mut both = tch::Tensor::arange(12, (tch::Kind::Float, tch::Device::Cpu)).view([2, 6]);
        let mut seen = Vec::new();
        super::GateUp::Merged(&mut both).rows::<f32>(3, |i, gate, up| seen.push((i, gate[0], up[2])));
        assert_eq!(seen, [(0, 0.0, 5.0), (1, 6.0, 11.0)]);
    }
}
