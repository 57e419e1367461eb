//! The optimizer's state of the own range of one bucket, in no more bytes than the parameter beside it lacks.
//!
//! A master is an fp32 number. Computing in fp32, the parameter is the master. Computing in bf16, the parameter is the
//! master's upper half, rounded to nearest with ties away from zero: adding half a unit and cutting. Then the master is
//! the parameter and its own lower 16 bits, to the bit ([`join`]), and only these are kept.

use super::pages::Pages;
use crate::ops::simd::vectorised;
use crate::restore::Part;
use half::bf16;
use std::ops::Range;

/// How masters and moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// fp32 parameters, which are the masters; fp32 moments.
    Whole,
    /// bf16 parameters, the lower halves of the masters, fp32 moments.
    Split,
    /// bf16 parameters without masters and bf16 moments, rounded stochastically.
    Narrow,
}

impl Form {
    /// Bytes for each element beside the parameter.
    pub const fn width(self) -> usize {
        self.master_width() + self.moments_width()
    }

    /// Bytes that the parameter lacks of its master.
    pub const fn master_width(self) -> usize {
        match self {
            Form::Whole | Form::Narrow => 0,
            Form::Split => 2,
        }
    }

    pub const fn moments_width(self) -> usize {
        match self {
            Form::Whole | Form::Split => 8,
            Form::Narrow => 4,
        }
    }

    /// Bytes of a saved element: master and moments.
    pub const fn saved_width(self) -> usize {
        match self {
            Form::Whole | Form::Split => 12,
            Form::Narrow => 6,
        }
    }

    /// What safetensors calls the type of saved numbers.
    pub const fn dtype(self) -> &'static str {
        match self {
            Form::Whole | Form::Split => "F32",
            Form::Narrow => "BF16",
        }
    }
}

/// What is kept beside the parameters of the own range of one bucket: `[own elements]` each.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    Whole { m: Pages<f32>, v: Pages<f32> },
    Split { low: Pages<u16>, m: Pages<f32>, v: Pages<f32> },
    Narrow { m: Pages<bf16>, v: Pages<bf16> },
}

/// A master's rounded upper half, and its lower one. A NaN stays one.
#[inline(always)]
pub fn split(master: f32) -> (bf16, u16) {
    (round(master), master.to_bits() as u16)
}

/// To the nearest bf16, ties away from zero: the parameter of a master.
#[inline(always)]
pub fn round(master: f32) -> bf16 {
    let bits = master.to_bits();
    bf16::from_bits(if master.is_nan() { 0x7fc0 } else { (bits.wrapping_add(0x8000) >> 16) as u16 })
}

/// The master that [`split`] has split.
#[inline(always)]
pub fn join(parameter: bf16, low: u16) -> f32 {
    let upper = u32::from(parameter.to_bits()) << 16;
    f32::from_bits(upper.wrapping_add(i32::from(low as i16) as u32))
}

vectorised! {
    /// Rounds masters to parameters.
    pub fn round_all(masters: &[f32], parameters: &mut [bf16]) {
        assert_eq!(masters.len(), parameters.len(), "a parameter for each master");
        parameters.iter_mut().zip(masters).for_each(|(p, x)| *p = round(*x));
    }
}

/// Numbers whose pages exist already: memory that a run will need is taken before its first step, not found missing in it.
pub(super) fn resident<T: Copy>(n: usize, other: T, zero: T) -> Vec<T> {
    let mut zeros = vec![other; n];
    // Without this the compiler asks for pages that the kernel zeroes on first use.
    std::hint::black_box(&mut zeros).fill(zero);
    zeros
}

impl State {
    /// All zero.
    pub fn new(form: Form, n: usize) -> Self {
        match form {
            Form::Whole => State::Whole { m: Pages::zero(n), v: Pages::zero(n) },
            Form::Split => State::Split { low: Pages::zero(n), m: Pages::zero(n), v: Pages::zero(n) },
            Form::Narrow => State::Narrow { m: Pages::zero(n), v: Pages::zero(n) },
        }
    }

    pub fn form(&self) -> Form {
        match self {
            State::Whole { .. } => Form::Whole,
            State::Split { .. } => Form::Split,
            State::Narrow { .. } => Form::Narrow,
        }
    }

    pub fn len(&self) -> usize {
        match self {
            State::Whole { m, .. } | State::Split { m, .. } => m.len(),
            State::Narrow { m, .. } => m.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn bytes(&self) -> u64 {
        (self.len() * self.form().width()) as u64
    }

    /// Whether `part` is kept here and not by the parameter alone.
    pub fn keeps(&self, part: Part) -> bool {
        part != Part::Master || self.form() == Form::Split
    }

    /// Sets elements from `at` on. Numbers of a narrow state are bf16 already.
    pub fn set(&mut self, part: Part, at: usize, values: &[f32]) {
        let range = at..at + values.len();
        let wide = |to: &mut [f32]| to[range.clone()].copy_from_slice(values);
        let narrow = |to: &mut [bf16]| {
            to[range.clone()].iter_mut().zip(values).for_each(|(to, x)| *to = bf16::from_f32(*x));
        };
        match (part, self) {
            (Part::Master, State::Split { low, .. }) => {
                low[range.clone()].iter_mut().zip(values).for_each(|(low, x)| *low = split(*x).1);
            }
            (Part::Master, _) => {}
            (Part::M, State::Whole { m, .. } | State::Split { m, .. }) => wide(m),
            (Part::V, State::Whole { v, .. } | State::Split { v, .. }) => wide(v),
            (Part::M, State::Narrow { m, .. }) => narrow(m),
            (Part::V, State::Narrow { v, .. }) => narrow(v),
        }
    }
}

/// Parameters of the own range of a bucket.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Values<'a> {
    Wide(&'a [f32]),
    Narrow(&'a [bf16]),
}

/// Everything about the own range of a bucket: what a checkpoint holds of it.
#[derive(Debug, Clone, Copy)]
pub struct Held<'a> {
    pub parameters: Values<'a>,
    pub state: &'a State,
}

// In chunks of a known length, so that the compiler makes copies of them.
vectorised! {
    fn wide_bytes(values: &[f32], out: &mut [u8]) {
        out.as_chunks_mut::<4>().0.iter_mut().zip(values).for_each(|(b, x)| *b = x.to_le_bytes());
    }
}
vectorised! {
    fn narrow_bytes(values: &[bf16], out: &mut [u8]) {
        out.as_chunks_mut::<2>().0.iter_mut().zip(values).for_each(|(b, x)| *b = x.to_le_bytes());
    }
}
vectorised! {
    fn joined_bytes(parameters: &[bf16], low: &[u16], out: &mut [u8]) {
        let both = parameters.iter().zip(low);
        out.as_chunks_mut::<4>().0.iter_mut().zip(both).for_each(|(b, (p, low))| *b = join(*p, *low).to_le_bytes());
    }
}

impl Held<'_> {
    /// Appends elements `range` of a part as they are saved: little-endian, of the form's type.
    pub fn append(&self, part: Part, range: Range<usize>, out: &mut Vec<u8>) {
        let begin = out.len();
        out.resize(begin + range.len() * self.state.form().saved_width() / Part::ALL.len(), 0);
        let out = &mut out[begin..];
        match (part, self.state, self.parameters) {
            (Part::Master, State::Whole { .. }, Values::Wide(parameters)) => wide_bytes(&parameters[range], out),
            (Part::Master, State::Narrow { .. }, Values::Narrow(parameters)) => narrow_bytes(&parameters[range], out),
            (Part::Master, State::Split { low, .. }, Values::Narrow(parameters)) => {
                joined_bytes(&parameters[range.clone()], &low[range], out);
            }
            (Part::Master, ..) => unreachable!("fp32 parameters have a whole state, bf16 parameters another"),
            (Part::M, State::Whole { m, .. } | State::Split { m, .. }, _) => wide_bytes(&m[range], out),
            (Part::V, State::Whole { v, .. } | State::Split { v, .. }, _) => wide_bytes(&v[range], out),
            (Part::M, State::Narrow { m, .. }, _) => narrow_bytes(&m[range], out),
            (Part::V, State::Narrow { v, .. }, _) => narrow_bytes(&v[range], out),
        }
    }

    /// Whether elements `range` of a part are all finite. A master is where its parameter is.
    pub fn is_finite(&self, part: Part, range: Range<usize>) -> bool {
        // Without an early end within a block, the compiler vectorizes it.
        let wide = |x: &[f32]| {
            let bad = |block: &[f32]| block.iter().fold(false, |bad, x| bad | !x.is_finite());
            !x[range.clone()].chunks(1 << 12).any(bad)
        };
        let narrow = |x: &[bf16]| {
            let bad = |block: &[bf16]| block.iter().fold(false, |bad, x| bad | (x.to_bits() & 0x7f80 == 0x7f80));
            !x[range.clone()].chunks(1 << 12).any(bad)
        };
        match (part, self.state, self.parameters) {
            (Part::Master, _, Values::Wide(parameters)) => wide(parameters),
            (Part::Master, _, Values::Narrow(parameters)) => narrow(parameters),
            (Part::M, State::Whole { m, .. } | State::Split { m, .. }, _) => wide(m),
            (Part::V, State::Whole { v, .. } | State::Split { v, .. }, _) => wide(v),
            (Part::M, State::Narrow { m, .. }, _) => narrow(m),
            (Part::V, State::Narrow { v, .. }, _) => narrow(v),
        }
    }
}

/// A copy of what [`Held`] shows, in as many bytes as a checkpoint has of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    parameters: OwnValues,
    state: State,
}

#[derive(Debug, Clone, PartialEq)]
enum OwnValues {
    Wide(Vec<f32>),
    Narrow(Vec<bf16>),
}

impl Kept {
    pub fn of(held: Held<'_>) -> Self {
        let parameters = match held.parameters {
            Values::Wide(x) => OwnValues::Wide(x.to_vec()),
            Values::Narrow(x) => OwnValues::Narrow(x.to_vec()),
        };
        Kept { parameters, state: held.state.clone() }
    }

    /// Copies again, into the same memory.
    pub fn take(&mut self, held: Held<'_>) {
        match (&mut self.parameters, held.parameters) {
            (OwnValues::Wide(to), Values::Wide(from)) => to.copy_from_slice(from),
            (OwnValues::Narrow(to), Values::Narrow(from)) => to.copy_from_slice(from),
            _ => unreachable!("a run's parameters stay of one kind"),
        }
        match (&mut self.state, held.state) {
            (State::Whole { m, v }, State::Whole { m: from_m, v: from_v }) => {
                m.copy_from_slice(from_m);
                v.copy_from_slice(from_v);
            }
            (State::Split { low, m, v }, State::Split { low: from_low, m: from_m, v: from_v }) => {
                low.copy_from_slice(from_low);
                m.copy_from_slice(from_m);
                v.copy_from_slice(from_v);
            }
            (State::Narrow { m, v }, State::Narrow { m: from_m, v: from_v }) => {
                m.copy_from_slice(from_m);
                v.copy_from_slice(from_v);
            }
            _ => unreachable!("a run's state stays of one form"),
        }
    }

    pub fn held(&self) -> Held<'_> {
        let parameters = match &self.parameters {
            OwnValues::Wide(x) => Values::Wide(x),
            OwnValues::Narrow(x) => Values::Narrow(x),
        };
        Held { parameters, state: &self.state }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Signs, subnormals, the least and the largest numbers, both sides of every carry and every tie.
    #[test]
    fn every_pattern_near_a_tie_comes_back() {
        for upper in 0..=u16::MAX {
            for lower in [0u16, 1, 2, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0x8002, 0xfffe, 0xffff] {
                let master = f32::from_bits(u32::from(upper) << 16 | u32::from(lower));
                let (parameter, low) = split(master);
                let joined = join(parameter, low);
                if master.is_nan() {
                    assert!(joined.is_nan() && parameter.is_nan(), "{:08x}", master.to_bits());
                    continue;
                }
                assert_eq!(joined.to_bits(), master.to_bits());
                if master.is_infinite() {
                    assert_eq!(parameter.to_f32(), master);
                    continue;
                }
                // As near as any: at most half the distance of neighbours, and away from zero where that is half.
                let (even, p) = (bf16::from_f32(master), parameter);
                let off = |p: bf16| (p.to_f64() - f64::from(master)).abs();
                assert!(off(p) == off(even), "{master:e} became {p} and not {even}");
                assert!(p == even || p.to_f64().abs() > f64::from(master).abs(), "{master:e} became {p}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_master_comes_back(bits: u32) {
            let master = f32::from_bits(bits);
            let (parameter, low) = split(master);
            prop_assert_eq!(parameter.is_nan(), master.is_nan());
            prop_assert!(master.is_nan() || join(parameter, low).to_bits() == bits);
        }
    }

    #[test]
    fn loops_for_every_instruction_set_round_alike() {
        let masters: Vec<f32> = (0..70_000u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).collect();
        let mut parameters = vec![bf16::ZERO; masters.len()];
        round_all(&masters, &mut parameters);
        assert!(masters.iter().zip(&parameters).all(|(x, p)| round(*x).to_bits() == p.to_bits()));
    }

    #[test]
    fn what_is_set_is_what_is_saved() {
        let values: Vec<f32> = (0..9).map(|i| (i as f32 - 4.3) * 1.001).collect();
        let narrow: Vec<bf16> = values.iter().map(|x| round(*x)).collect();
        let exact: Vec<f32> = narrow.iter().map(|p| p.to_f32()).collect();
        let cases = [
            (Form::Whole, Values::Wide(&values), &values, 4),
            (Form::Split, Values::Narrow(&narrow), &values, 4),
            (Form::Narrow, Values::Narrow(&narrow), &exact, 2),
        ];
        for (form, parameters, expected, width) in cases {
            let mut state = State::new(form, 9);
            for part in Part::ALL {
                state.set(part, 0, &expected[..4]);
                state.set(part, 4, &expected[4..]);
            }
            let held = Held { parameters, state: &state };
            let mut kept = Kept::of(Held { parameters, state: &State::new(form, 9) });
            kept.take(held);
            for (part, held) in Part::ALL.into_iter().flat_map(|part| [(part, held), (part, kept.held())]) {
                let mut bytes = vec![];
                held.append(part, 2..7, &mut bytes);
                let saved: Vec<f32> = match width {
                    2 => bytes.chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
                    _ => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
                };
                assert_eq!(saved, expected[2..7], "{form:?} {part:?}");
                assert!(held.is_finite(part, 0..9));
            }
            assert_eq!(state.bytes() + (9 * if form == Form::Whole { 4 } else { 2 }), 9 * form.saved_width() as u64);
        }
    }

    #[test]
    fn a_number_that_is_not_finite_is_seen() {
        let parameters = [bf16::ONE, bf16::INFINITY];
        let mut state = State::new(Form::Split, 2);
        state.set(Part::V, 0, &[f32::NAN]);
        let held = Held { parameters: Values::Narrow(&parameters), state: &state };
        assert!(!held.is_finite(Part::Master, 0..2) && held.is_finite(Part::Master, 0..1));
        assert!(!held.is_finite(Part::V, 0..2) && held.is_finite(Part::M, 0..2));
    }
}
