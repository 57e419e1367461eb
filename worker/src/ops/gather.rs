//! Between the output of attention, token by token, and the blocks in which it is computed.
//!
//! A block is `[documents * kv heads, queries * group, D]`; tokens are `[rows, heads * D]`.

use super::documents::{Block, Tile};
use super::form::{indices, Form};
use super::heads::Heads;
use super::simd::{dot, vectorised, Narrow};
use super::view::{elements, elements_mut, Element};
use half::bf16;
use std::ops::Range;
use tch::Tensor;

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
    match Form::of(part) {
        Form::Single => copy::<f32>(part, tile, block, heads, output),
        Form::Brain => copy::<bf16>(part, tile, block, heads, output),
        Form::Aten => {
            let (blocks, tokens, _) = places(tile, block, heads, part);
            let width = (heads.count / heads.kv * heads.dim) as i64;
            let rows = part.reshape([-1, width]).index_select(0, &blocks);
            let _ = output.view([-1, width]).index_copy_(0, &tokens, &rows);
        }
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
    match Form::of(grad) {
        Form::Single => spread_rows::<f32>(
            elements(grad),
            elements(output),
            tile,
            block,
            heads,
            elements_mut(part),
            elements_mut(delta),
        ),
        Form::Brain => spread_rows::<bf16>(
            elements(grad),
            elements(output),
            tile,
            block,
            heads,
            elements_mut(part),
            elements_mut(delta),
        ),
        Form::Aten => {
            let (blocks, tokens, statistics) = places(tile, block, heads, grad);
            let (group, dim) = ((heads.count / heads.kv) as i64, heads.dim as i64);
            let rows = |of: &Tensor| of.reshape([-1, group * dim]).index_select(0, &tokens);
            let (grad, output, wide) = (rows(grad), rows(output), delta.kind());
            let _ = part.zero_();
            let _ = part.view([-1, group * dim]).index_copy_(0, &blocks, &grad);
            let products = grad.to_kind(wide) * output.to_kind(wide);
            let products = products.view([-1, group, dim]).sum_dim_intlist([-1i64].as_slice(), false, wide);
            let _ = delta.view([-1, group]).index_copy_(0, &statistics, &products);
        }
    }
}

/// Of every token of the block and every kv head, in units of what they share (`group * D` elements, or `group` statistics):
/// the places in the block, among the tokens and among the statistics.
fn places(tile: &Tile, block: &Block, heads: Heads, beside: &Tensor) -> (Tensor, Tensor, Tensor) {
    let group = heads.count / heads.kv;
    let width = group * heads.dim;
    let (mut blocks, mut tokens, mut statistics) = (Vec::new(), Vec::new(), Vec::new());
    visit(tile, block, heads, |of_block, of_tokens, statistic| {
        if let Some(of_tokens) = of_tokens {
            blocks.push((of_block.start / width) as i64);
            tokens.push((of_tokens.start / width) as i64);
            statistics.push((statistic / group) as i64);
        }
    });
    (indices(blocks, beside), indices(tokens, beside), indices(statistics, beside))
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
