//! Loops over rows of matrices: lookup, selection, sums of columns, conversion.

use super::simd::{vectorised, Narrow};
use super::view::{elements, elements_mut};
use half::bf16;
use tch::{Kind, Tensor};

/// Rows of `table` `[_, H]` by id to the first rows of the wide `output` `[rows, H]`; the rest becomes zero.
pub fn look_up(table: &Tensor, ids: &[u32], output: &mut Tensor) {
    let width = output.size()[1] as usize;
    match table.kind() {
        Kind::Float => look_up_rows::<f32>(elements(table), width, ids, elements_mut(output)),
        Kind::BFloat16 => look_up_rows::<bf16>(elements(table), width, ids, elements_mut(output)),
        _ => {
            let _ = output.zero_();
            output.narrow(0, 0, ids.len() as i64).copy_(&table.index_select(0, &index(ids)));
        }
    }
}

fn index(ids: &[u32]) -> Tensor {
    Tensor::from_slice(&ids.iter().map(|&i| i as i64).collect::<Vec<_>>())
}

vectorised! {
    fn look_up_rows<C: Narrow>(table: &[C], width: usize, ids: &[u32], output: &mut [f32]) {
        let (real, padding) = output.split_at_mut(ids.len() * width);
        for (out, &id) in real.chunks_exact_mut(width).zip(ids) {
            let row = &table[id as usize * width..][..width];
            out.iter_mut().zip(row).for_each(|(o, v)| *o = v.load());
        }
        padding.fill(0.0);
    }
}

/// The gradient of [`look_up`] by row of the table: the distinct ids, ascending, and for each the sum of the rows of the
/// wide `grad` `[rows, H]` that it was looked up for, first to last: wide `[distinct, H]`.
pub fn sum_by_id(grad: &Tensor, ids: &[u32]) -> (Vec<u32>, Tensor) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&row| (ids[row as usize], row));
    let mut distinct: Vec<u32> = order.iter().map(|&row| ids[row as usize]).collect();
    distinct.dedup();
    let width = grad.size()[1];
    let mut sums = Tensor::zeros([distinct.len() as i64, width], (grad.kind(), grad.device()));
    let groups = order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]);
    if grad.kind() == Kind::Float {
        let grad = elements::<f32>(grad);
        for (sum, group) in elements_mut::<f32>(&mut sums).chunks_exact_mut(width as usize).zip(groups) {
            for &row in group {
                add(sum, &grad[row as usize * width as usize..][..width as usize]);
            }
        }
    } else {
        let at: Vec<i64> = groups.enumerate().flat_map(|(i, group)| vec![i as i64; group.len()]).collect();
        let _ = sums.index_add_(0, &Tensor::from_slice(&at), &grad.index_select(0, &index(&order)));
    }
    (distinct, sums)
}

vectorised! {
    fn add<C: Narrow>(sum: &mut [f32], values: &[C]) {
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += v.load());
    }
}

/// Adds `values`, of the compute kind, to the wide `sum` of equally many elements; both contiguous.
pub fn accumulate(sum: &mut Tensor, values: &Tensor) {
    match (sum.kind(), values.kind()) {
        (Kind::Float, Kind::Float) => add::<f32>(elements_mut(sum), elements(values)),
        (Kind::Float, Kind::BFloat16) => add::<bf16>(elements_mut(sum), elements(values)),
        _ => {
            let _ = sum.g_add_(&values.view(sum.size().as_slice()));
        }
    }
}

/// Where blocks lie in a flat tensor: block `b` from `first + b * stride` on.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub first: usize,
    pub stride: usize,
}

/// Adds the blocks `[B, ...]`, of the compute kind, to the flat wide `sum` at their places.
pub fn accumulate_blocks(sum: &mut Tensor, blocks: &Tensor, place: Place) {
    let length = blocks.numel() / blocks.size()[0] as usize;
    match blocks.kind() {
        Kind::Float => add_blocks::<f32>(elements_mut(sum), elements(blocks), place, length),
        Kind::BFloat16 => add_blocks::<bf16>(elements_mut(sum), elements(blocks), place, length),
        _ => {
            let (sum, blocks) = (elements_mut::<f64>(sum), elements::<f64>(blocks));
            for (b, block) in blocks.chunks_exact(length).enumerate() {
                let sum = &mut sum[place.first + b * place.stride..][..length];
                sum.iter_mut().zip(block).for_each(|(s, v)| *s += v);
            }
        }
    }
}

vectorised! {
    fn add_blocks<C: Narrow>(sum: &mut [f32], blocks: &[C], place: Place, length: usize) {
        for (b, block) in blocks.chunks_exact(length).enumerate() {
            let sum = &mut sum[place.first + b * place.stride..][..length];
            sum.iter_mut().zip(block).for_each(|(s, v)| *s += v.load());
        }
    }
}

/// Rows `at` of the wide `base` `[_, H]` plus those of `addend` (compute kind, with a bias) to the first rows of the wide
/// `output`; the rest becomes zero.
pub fn select_sum(base: &Tensor, addend: &Tensor, bias: Option<&Tensor>, at: &[u32], output: &mut Tensor) {
    let width = output.size()[1] as usize;
    let (rest, wide) = (output.size()[0] as usize - at.len(), output.kind());
    match addend.kind() {
        Kind::Float => {
            select_rows::<f32>(elements(base), elements(addend), bias.map(elements), width, at, elements_mut(output));
        }
        Kind::BFloat16 => {
            select_rows::<bf16>(elements(base), elements(addend), bias.map(elements), width, at, elements_mut(output));
        }
        _ => {
            let rows = index(at);
            let mut sum = base.index_select(0, &rows) + addend.index_select(0, &rows).to_kind(wide);
            if let Some(bias) = bias {
                sum += bias.to_kind(wide);
            }
            output.copy_(&sum.constant_pad_nd([0, 0, 0, rest as i64]));
        }
    }
}

vectorised! {
    fn select_rows<C: Narrow>(
        base: &[f32], addend: &[C], bias: Option<&[C]>, width: usize, at: &[u32], output: &mut [f32],
    ) {
        let (real, padding) = output.split_at_mut(at.len() * width);
        for (out, &row) in real.chunks_exact_mut(width).zip(at) {
            let from = row as usize * width..(row as usize + 1) * width;
            for ((o, b), a) in out.iter_mut().zip(&base[from.clone()]).zip(&addend[from]) {
                *o = b + a.load();
            }
            for (o, b) in out.iter_mut().zip(bias.into_iter().flatten()) {
                *o += b.load();
            }
        }
        padding.fill(0.0);
    }
}

/// Writes the first rows of `source` to the rows `at` of `output`, both `[_, H]` of one kind; other rows become zero.
pub fn scatter(source: &Tensor, at: &[u32], output: &mut Tensor) {
    fn copy<T: super::view::Element + Default>(source: &Tensor, at: &[u32], output: &mut Tensor) {
        let width = output.size()[1] as usize;
        let output = elements_mut::<T>(output);
        output.fill(T::default());
        for (from, &row) in elements::<T>(source).chunks_exact(width).zip(at) {
            output[row as usize * width..][..width].copy_from_slice(from);
        }
    }
    match output.kind() {
        Kind::Float => copy::<f32>(source, at, output),
        Kind::BFloat16 => copy::<bf16>(source, at, output),
        _ => copy::<f64>(source, at, output),
    }
}

/// The sums of the columns of `matrix` `[T, N]`, from first to last row: wide `[N]`.
pub fn sum_columns(matrix: &Tensor, wide: Kind) -> Tensor {
    let width = matrix.size()[1];
    let mut sums = Tensor::zeros([width], (wide, matrix.device()));
    match matrix.kind() {
        Kind::Float => add_rows::<f32>(elements_mut(&mut sums), elements(matrix)),
        Kind::BFloat16 => add_rows::<bf16>(elements_mut(&mut sums), elements(matrix)),
        _ => sums = matrix.sum_dim_intlist([0i64].as_slice(), false, wide),
    }
    sums
}

vectorised! {
    fn add_rows<C: Narrow>(sums: &mut [f32], matrix: &[C]) {
        for row in matrix.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += v.load());
        }
    }
}
