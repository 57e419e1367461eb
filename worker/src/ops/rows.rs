//! Loops over rows of matrices: lookup, selection, sums of columns, conversion.

use super::form::{indices, small_integers, Form};
use super::kernels::{blocks, word, Kernels};
use super::simd::{vectorised, Narrow};
use super::view::{elements, elements_mut, Element};
use half::bf16;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Rows of `table` `[_, H]` by id to the first rows of the wide `output` `[rows, H]`; the rest becomes zero.
pub fn look_up(table: &Tensor, ids: &[u32], output: &mut Tensor) {
    let width = output.size()[1] as usize;
    if let Some(kernels) = Kernels::on(table) {
        let rows = output.size()[0] as usize;
        let ids = small_integers((0..rows).map(|r| ids.get(r).map_or(-1, |&id| id as i32)), table);
        let name = format!("look_up_{}", word(table.kind()));
        let arguments = [table.into(), (&ids).into(), (&*output).into(), width.into()];
        return kernels.launch(&name, blocks(rows, 256), &arguments);
    }
    match Form::of(table) {
        Form::Single => look_up_rows::<f32>(elements(table), width, ids, elements_mut(output)),
        Form::Brain => look_up_rows::<bf16>(elements(table), width, ids, elements_mut(output)),
        Form::Aten => {
            let _ = output.zero_();
            output.narrow(0, 0, ids.len() as i64).copy_(&table.index_select(0, &index(ids, table)));
        }
    }
}

fn index(ids: &[u32], beside: &Tensor) -> Tensor {
    indices(ids.iter().map(|&i| i64::from(i)), beside)
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

/// The distinct `ids`, ascending.
pub fn distinct(ids: &[u32]) -> Vec<u32> {
    let mut distinct = ids.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    distinct
}

/// The gradient of [`look_up`] by row of the table: for each of the [`distinct`] ids the sum of the rows of the wide `grad`
/// `[rows, H]` that it was looked up for, first to last, to `sums`: wide `[distinct, H]`.
pub fn sum_by_id(grad: &Tensor, ids: &[u32], sums: &mut Tensor) {
    if let Some(kernels) = Kernels::on(grad) {
        return sum_by_id_kernel(kernels, grad, ids, sums);
    }
    if grad.device() != Device::Cpu {
        // Devices add rows in any order.
        let mut on_host = sums.to_device(Device::Cpu);
        sum_by_id(&grad.to_device(Device::Cpu), ids, &mut on_host);
        return sums.copy_(&on_host);
    }
    let order = by_id(ids);
    let groups = order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]);
    let _ = sums.zero_();
    if Form::of(grad) == Form::Single {
        let width = grad.size()[1] as usize;
        let grad = elements::<f32>(grad);
        for (sum, group) in elements_mut::<f32>(sums).chunks_exact_mut(width).zip(groups) {
            for &row in group {
                add(sum, &grad[row as usize * width..][..width]);
            }
        }
    } else {
        let at = groups.enumerate().flat_map(|(i, group)| vec![i as i64; group.len()]);
        let _ = sums.index_add_(0, &indices(at, grad), &grad.index_select(0, &index(&order, grad)));
    }
}

/// Rows in the order of their ids.
fn by_id(ids: &[u32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&row| (ids[row as usize], row));
    order
}

fn sum_by_id_kernel(kernels: Kernels, grad: &Tensor, ids: &[u32], sums: &mut Tensor) {
    let order = by_id(ids);
    let first = |at: &usize| *at == 0 || ids[order[*at] as usize] != ids[order[*at - 1] as usize];
    let starts = (0..order.len()).filter(first).chain([order.len()]);
    let starts = small_integers(starts.map(|at| at as i32), grad);
    let order = small_integers(order.iter().map(|&row| row as i32), grad);
    let (groups, width) = (sums.size()[0] as usize, sums.size()[1] as usize);
    let arguments = [grad.into(), (&order).into(), (&starts).into(), (&*sums).into(), width.into()];
    kernels.launch("sum_by_id", blocks(groups, 256).times(width.div_ceil(256)), &arguments);
}

vectorised! {
    fn add<C: Narrow>(sum: &mut [f32], values: &[C]) {
        sum.iter_mut().zip(values).for_each(|(s, v)| *s += v.load());
    }
}

/// Adds `values`, of the compute kind, to the wide `sum` of equally many elements; both contiguous.
pub fn accumulate(sum: &mut Tensor, values: &Tensor) {
    match (Form::of(sum), Form::of(values)) {
        (Form::Single, Form::Single) => add::<f32>(elements_mut(sum), elements(values)),
        (Form::Single, Form::Brain) => add::<bf16>(elements_mut(sum), elements(values)),
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
    match Form::of(blocks) {
        Form::Single => add_blocks::<f32>(elements_mut(sum), elements(blocks), place, length),
        Form::Brain => add_blocks::<bf16>(elements_mut(sum), elements(blocks), place, length),
        Form::Aten => {
            let shape = [blocks.size()[0], length as i64];
            let mut places = sum.as_strided(shape, [place.stride as i64, 1], place.first as i64);
            let _ = places.g_add_(&blocks.reshape(shape));
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

/// For each of the chosen rows its elements among them, and those of row `at[i]` among all.
fn pairs(at: &[u32], width: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + '_ {
    let range = move |row: usize| row * width..(row + 1) * width;
    at.iter().enumerate().map(move |(i, &row)| (range(i), range(row as usize)))
}

/// Copies the rows `at` of `all` to the first rows of `chosen`, both `[_, N]` of one kind; the rest becomes zero.
pub fn pick(all: &Tensor, at: &[u32], chosen: &mut Tensor) {
    fn copy<T: Element + Default>(all: &Tensor, at: &[u32], chosen: &mut Tensor) {
        let width = chosen.size()[1] as usize;
        let (all, chosen) = (elements::<T>(all), elements_mut::<T>(chosen));
        pairs(at, width).for_each(|(few, many)| chosen[few].copy_from_slice(&all[many]));
        chosen[at.len() * width..].fill(T::default());
    }
    match Form::of(all) {
        Form::Single => copy::<f32>(all, at, chosen),
        Form::Brain => copy::<bf16>(all, at, chosen),
        Form::Aten => {
            let _ = chosen.zero_();
            chosen.narrow(0, 0, at.len() as i64).copy_(&all.index_select(0, &index(at, all)));
        }
    }
}

/// The backward of [`pick`]: copies the first rows of `chosen` to the rows `at` of `all`; other rows become zero.
pub fn scatter(chosen: &Tensor, at: &[u32], all: &mut Tensor) {
    fn copy<T: Element + Default>(chosen: &Tensor, at: &[u32], all: &mut Tensor) {
        let width = all.size()[1] as usize;
        let (chosen, all) = (elements::<T>(chosen), elements_mut::<T>(all));
        all.fill(T::default());
        pairs(at, width).for_each(|(few, many)| all[many].copy_from_slice(&chosen[few]));
    }
    match Form::of(all) {
        Form::Single => copy::<f32>(chosen, at, all),
        Form::Brain => copy::<bf16>(chosen, at, all),
        Form::Aten => {
            let _ = all.zero_();
            let _ = all.index_copy_(0, &index(at, all), &chosen.narrow(0, 0, at.len() as i64));
        }
    }
}

/// The sums of the columns of `matrix` `[T, N]`, from first to last row: wide `[N]`.
pub fn sum_columns(matrix: &Tensor, wide: Kind) -> Tensor {
    let width = matrix.size()[1];
    let mut sums = Tensor::zeros([width], (wide, matrix.device()));
    if let Some(kernels) = Kernels::on(matrix) {
        let (rows, width) = (matrix.size()[0] as usize, width as usize);
        let slabs = rows.div_ceil(SLAB);
        let partial = Tensor::empty([slabs as i64, width as i64], (Kind::Float, matrix.device()));
        let name = format!("sum_slab_{}", word(matrix.kind()));
        let arguments = [matrix.into(), (&partial).into(), rows.into(), width.into(), SLAB.into()];
        kernels.launch(&name, blocks(slabs, 256).times(width.div_ceil(256)), &arguments);
        sum_slabs(kernels, &partial, &mut sums);
        return sums;
    }
    match Form::of(matrix) {
        Form::Single => add_rows::<f32>(elements_mut(&mut sums), elements(matrix)),
        Form::Brain => add_rows::<bf16>(elements_mut(&mut sums), elements(matrix)),
        Form::Aten => sums = matrix.sum_dim_intlist([0i64].as_slice(), false, wide),
    }
    sums
}

/// Rows that a block of a GPU sums alone: enough blocks for a whole GPU, from a thousand rows on.
pub(super) const SLAB: usize = 16;

/// The sums of the columns of `partial` `[slabs, N]`, as kernels leave them: fp32 `[N]`.
pub(super) fn sum_slabs(kernels: Kernels, partial: &Tensor, sums: &mut Tensor) {
    let (slabs, width) = (partial.size()[0] as usize, partial.size()[1] as usize);
    let arguments = [partial.into(), (&*sums).into(), slabs.into(), width.into()];
    kernels.launch("sum_slabs", blocks(width.div_ceil(32), 256), &arguments);
}

vectorised! {
    fn add_rows<C: Narrow>(sums: &mut [f32], matrix: &[C]) {
        for row in matrix.chunks_exact(sums.len()) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += v.load());
        }
    }
}
