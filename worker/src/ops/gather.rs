//! Between the output of attention, token by token, and the blocks in which it is computed.
//!
//! A block is `[documents * kv heads, queries * group, D]`; tokens are `[rows, heads * D]`.

use super::documents::{Block, Tile};
use super::heads::Heads;
use super::simd::{dot, vectorised, Narrow};
use super::view::{elements, elements_mut, Element};
use half::bf16;
use std::ops::Range;
use tch::{Kind, Tensor};

/// Calls `visit(elements of the block, elements of the tokens or none for padding, first row of the statistics)` for every
/// position and kv head: `group * D` adjacent elements in both.
#[inline(always)]
fn visit(tile: &Tile, block: &Block, heads: Heads, mut visit: impl FnMut(Range<usize>, Option<Range<usize>>, usize)) {
    let group = heads.count / heads.kv;
    let width = group * heads.dim;
    let mut offset = 0;
    for (d, document) in tile.documents.iter().enumerate() {
        for kv in 0..heads.kv {
            for s in block.queries.clone() {
                let at = (document.start + s) * heads.width() + kv * width;
                let statistic = ((tile.base + d * tile.padded) * heads.kv + kv * tile.padded + s) * group;
                visit(offset..offset + width, (s < document.length).then_some(at..at + width), statistic);
                offset += width;
            }
        }
    }
}

/// Copies a block to its tokens.
pub fn gather(part: &Tensor, tile: &Tile, block: &Block, heads: Heads, output: &mut Tensor) {
    fn copy<T: Element>(part: &Tensor, tile: &Tile, block: &Block, heads: Heads, output: &mut Tensor) {
        let (part, output) = (elements::<T>(part), elements_mut::<T>(output));
        visit(tile, block, heads, |from, to, _| {
            if let Some(to) = to {
                output[to].copy_from_slice(&part[from]);
            }
        });
    }
    match part.kind() {
        Kind::Float => copy::<f32>(part, tile, block, heads, output),
        Kind::BFloat16 => copy::<bf16>(part, tile, block, heads, output),
        _ => copy::<f64>(part, tile, block, heads, output),
    }
}

/// Zeroes the rows past the tokens.
pub fn clear_padding(output: &mut Tensor, tokens: usize) {
    let rows = output.size()[0];
    let _ = output.narrow(0, tokens as i64, rows - tokens as i64).zero_();
}

/// Copies the tokens' gradients to a block (padding as zeros), and writes for each of its rows the product of the
/// attention's output with its gradient: wide `[padded tokens * heads]`.
pub fn spread(
    grad: &Tensor,
    output: &Tensor,
    tile: &Tile,
    block: &Block,
    heads: Heads,
    part: &mut Tensor,
    delta: &mut Tensor,
) {
    match grad.kind() {
        Kind::Float => spread_rows::<f32>(
            elements(grad),
            elements(output),
            tile,
            block,
            heads,
            elements_mut(part),
            elements_mut(delta),
        ),
        Kind::BFloat16 => spread_rows::<bf16>(
            elements(grad),
            elements(output),
            tile,
            block,
            heads,
            elements_mut(part),
            elements_mut(delta),
        ),
        _ => {
            let (grad, output) = (elements::<f64>(grad), elements::<f64>(output));
            let (part, delta) = (elements_mut::<f64>(part), elements_mut::<f64>(delta));
            visit(tile, block, heads, |to, from, statistic| {
                let Some(from) = from else { return part[to].fill(0.0) };
                part[to].copy_from_slice(&grad[from.clone()]);
                let rows = grad[from.clone()].chunks(heads.dim).zip(output[from].chunks(heads.dim));
                for (d, (a, b)) in delta[statistic..].iter_mut().zip(rows) {
                    *d = a.iter().zip(b).map(|(a, b)| a * b).sum();
                }
            });
        }
    }
}

vectorised! {
    fn spread_rows<C: Narrow>(
        grad: &[C], output: &[C], tile: &Tile, block: &Block, heads: Heads, part: &mut [C], delta: &mut [f32],
    ) {
        visit(tile, block, heads, |to, from, statistic| {
            let Some(from) = from else { return part[to].fill(C::default()) };
            part[to].copy_from_slice(&grad[from.clone()]);
            let rows = grad[from.clone()].chunks_exact(heads.dim).zip(output[from].chunks_exact(heads.dim));
            for (d, (a, b)) in delta[statistic..].iter_mut().zip(rows) {
                *d = dot(a, b);
            }
        });
    }
}
