//! From the rows of a projection to the heads of attention and back: bias, norm of each head (Qwen 3), rotary position
//! embedding (Su et al. 2021, halves rotated as in transformers' `rotate_half`) and the change of layout.
//!
//! Layout of heads: tile by tile, in it document by document, in it `[kv heads, padded length, group, D]`, where `group`
//! query heads share a key. So a document's queries are `[kv heads, length * group, D]` without expanding keys. Where
//! documents lie flat, the layout is `[rows, heads, D]`.

use super::documents::Documents;
use super::form::{indices, wide, Form};
use super::kernels::{blocks, word, Argument, Kernels};
use super::norm::product;
use super::rotation::Rotation;
use super::rows::{sum_slabs, SLAB};
use super::simd::{dot, vectorised, Narrow};
use super::view::{elements, elements_mut};
use half::bf16;
use tch::{Kind, Tensor};

/// Adjacent columns of the rows of a matrix: head `h` at `first + h * D`.
#[derive(Clone, Copy)]
pub struct Columns<'a> {
    /// `[T, stride]`
    pub matrix: &'a Tensor,
    pub first: usize,
    /// `[heads * D]`
    pub bias: Option<&'a Tensor>,
}

/// How many heads, and how they share keys.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// All of them: kv heads times group.
    pub count: usize,
    pub kv: usize,
    pub dim: usize,
}

/// A norm over each head, by weight `[D]`.
#[derive(Clone, Copy)]
pub struct HeadNorm<'a> {
    pub weight: &'a Tensor,
    pub eps: f64,
}

impl Heads {
    fn group(&self) -> usize {
        self.count / self.kv
    }

    pub fn width(&self) -> usize {
        self.count * self.dim
    }

    /// Calls `visit(token or none for padding, position, head, offset in the layout)` for every head of every position.
    #[inline(always)]
    fn visit(&self, documents: &Documents, mut visit: impl FnMut(Option<usize>, usize, usize, usize)) {
        let group = self.group();
        if let Some(flat) = &documents.flat {
            for (row, &position) in flat.places.iter().enumerate() {
                for head in 0..self.count {
                    let token = (position >= 0).then_some(row);
                    visit(token, position.max(0) as usize, head, (row * self.count + head) * self.dim);
                }
            }
        }
        for tile in &documents.tiles {
            let mut offset = tile.base * self.width();
            for document in &tile.documents {
                for kv in 0..self.kv {
                    for position in 0..tile.padded {
                        let token = (position < document.length).then_some(document.start + position);
                        for g in 0..group {
                            visit(token, position, kv * group + g, offset);
                            offset += self.dim;
                        }
                    }
                }
            }
        }
    }

    /// Indices of the layout's rows as tokens (`[padded * count]`, -1 for padding), positions and heads: for slow twins.
    fn indices(&self, documents: &Documents, beside: &Tensor) -> (Tensor, Tensor, Tensor) {
        let (mut tokens, mut positions, mut heads) = (Vec::new(), Vec::new(), Vec::new());
        self.visit(documents, |token, position, head, _| {
            tokens.push(token.map_or(-1, |t| t as i64));
            positions.push(position as i64);
            heads.push(head as i64);
        });
        (indices(tokens, beside), indices(positions, beside), indices(heads, beside))
    }
}

/// Writes the heads of `source` to `output`, flat `[padded * count * D]` of the compute kind, padding as zeros.
pub fn split(
    source: Columns<'_>,
    norm: Option<HeadNorm<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
) {
    if let Some(kernels) = heads.kernels(source.matrix, documents) {
        return split_kernel(kernels, source, norm, rotation, documents, heads, output);
    }
    match Form::of(source.matrix) {
        Form::Single => split_fast::<f32>(source, norm, rotation, documents, heads, output),
        Form::Brain => split_fast::<bf16>(source, norm, rotation, documents, heads, output),
        Form::Aten => split_slow(source, norm, rotation, documents, heads, output),
    }
}

impl Heads {
    /// There are kernels for documents that lie flat.
    fn kernels(&self, beside: &Tensor, documents: &Documents) -> Option<Kernels> {
        let fits = documents.flat.is_some() && self.dim.is_multiple_of(2) && self.dim <= 256;
        Kernels::on(beside).filter(|_| fits)
    }

    /// Pairs of a head's elements that a lane takes: in the names of kernels.
    fn pairs(&self) -> usize {
        self.dim.div_ceil(64).next_power_of_two()
    }
}

/// What both kernels read of bias, norm and rotation.
fn options(bias: Option<&Tensor>, norm: Option<HeadNorm<'_>>, rotation: Option<&Rotation>) -> [Argument; 5] {
    [
        bias.into(),
        norm.map(|n| n.weight).into(),
        (norm.map_or(0.0, |n| n.eps) as f32).into(),
        rotation.map(|r| &r.cos).into(),
        rotation.map(|r| &r.sin).into(),
    ]
}

fn positions(documents: &Documents) -> &Tensor {
    &documents.flat.as_ref().expect("kernels are for documents that lie flat").positions
}

fn split_kernel(
    kernels: Kernels,
    source: Columns<'_>,
    norm: Option<HeadNorm<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
) {
    let name = format!("split_heads_{}_{}", word(output.kind()), heads.pairs());
    let stride = source.matrix.size()[1] as usize;
    let from = [source.matrix.into(), stride.into(), source.first.into()];
    let to = [positions(documents).into(), (&*output).into()];
    let shape = [documents.rows.into(), heads.count.into(), heads.dim.into()];
    let arguments = [&from[..], &options(source.bias, norm, rotation), &to, &shape].concat();
    kernels.launch(&name, blocks((documents.rows * heads.count).div_ceil(8), 256), &arguments);
}

fn split_fast<C: Narrow>(
    source: Columns<'_>,
    norm: Option<HeadNorm<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
) {
    split_rows::<C>(
        elements(source.matrix),
        (source.matrix.size()[1] as usize, source.first),
        source.bias.map(elements::<C>),
        norm.map(|n| (elements::<C>(n.weight), n.eps as f32)),
        rotation.map(|r| (elements(&r.cos), elements(&r.sin))),
        documents,
        heads,
        elements_mut(output),
    );
}

vectorised! {
    fn split_rows<C: Narrow>(
        source: &[C],
        place: (usize, usize),
        bias: Option<&[C]>,
        norm: Option<(&[C], f32)>,
        rotation: Option<(&[f32], &[f32])>,
        documents: &Documents,
        heads: Heads,
        output: &mut [C],
    ) {
        let ((stride, first), dim) = (place, heads.dim);
        let mut head_values = vec![0.0f32; dim];
        heads.visit(documents, |token, position, head, offset| {
            let out = &mut output[offset..offset + dim];
            let Some(token) = token else { return out.fill(C::default()) };
            let from = &source[token * stride + first + head * dim..][..dim];
            if bias.is_none() && norm.is_none() && rotation.is_none() {
                return out.copy_from_slice(from);
            }
            let values = &mut head_values[..dim];
            load_head(from, bias.map(|b| &b[head * dim..][..dim]), values);
            if let Some((weight, eps)) = norm {
                let rstd = 1.0 / (dot(values, values) / dim as f32 + eps).sqrt();
                for (v, w) in values.iter_mut().zip(weight) {
                    *v *= rstd * w.load();
                }
            }
            let Some((cos, sin)) = rotation else {
                for (o, v) in out.iter_mut().zip(values) {
                    *o = C::store(*v);
                }
                return;
            };
            let half = dim / 2;
            let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
            let ((x, y), (out_x, out_y)) = (values.split_at(half), out.split_at_mut(half));
            for ((((x, y), c), s), (ox, oy)) in x.iter().zip(y).zip(cos).zip(sin).zip(out_x.iter_mut().zip(out_y)) {
                *ox = C::store(x * c - y * s);
                *oy = C::store(y * c + x * s);
            }
        });
    }
}

#[inline(always)]
fn load_head<C: Narrow>(from: &[C], bias: Option<&[C]>, values: &mut [f32]) {
    match bias {
        None => values.iter_mut().zip(from).for_each(|(v, x)| *v = x.load()),
        Some(bias) => values.iter_mut().zip(from).zip(bias).for_each(|((v, x), b)| *v = x.load() + b.load()),
    }
}

/// The columns with their bias, wide `[T, heads, D]`.
fn wide_heads(source: Columns<'_>, heads: Heads, wide: Kind) -> Tensor {
    let columns = source.matrix.narrow(1, source.first as i64, heads.width() as i64).to_kind(wide);
    let columns = match source.bias {
        // Not in place: the columns may be the matrix itself.
        Some(bias) => columns + bias.to_kind(wide),
        None => columns,
    };
    columns.reshape([-1, heads.count as i64, heads.dim as i64])
}

/// As [`split`], in ATen calls of any kind.
pub fn split_slow(
    source: Columns<'_>,
    norm: Option<HeadNorm<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
) {
    let wide = wide(source.matrix.kind());
    let mut values = wide_heads(source, heads, wide);
    if let Some(norm) = norm {
        let rstd = (values.square().mean_dim([-1i64].as_slice(), true, wide) + norm.eps).rsqrt();
        values = values * rstd * norm.weight.to_kind(wide);
    }
    let (tokens, positions, head) = heads.indices(documents, &values);
    let mut rows = values.index(&[Some(tokens.clamp_min(0)), Some(head)]);
    if let Some(rotation) = rotation {
        rows = rotate(&rows, rotation, &positions, 1.0);
    }
    let rows = rows * tokens.ge(0).to_kind(wide).unsqueeze(-1);
    output.copy_(&rows.view([-1]));
}

fn rotate(rows: &Tensor, rotation: &Rotation, positions: &Tensor, sign: f64) -> Tensor {
    let (cos, sin) = (rotation.cos.index_select(0, positions), rotation.sin.index_select(0, positions) * sign);
    let halves = rows.chunk(2, -1);
    let (x, y) = (&halves[0], &halves[1]);
    Tensor::cat(&[x * &cos - y * &sin, y * &cos + x * &sin], -1)
}

/// What the backward pass of a normed projection reads and writes besides.
pub struct NormGradient<'a> {
    /// What [`split`] read.
    pub source: Columns<'a>,
    pub norm: HeadNorm<'a>,
    /// Written: wide `[D]`, summed over heads, then tokens in the order of the layout.
    pub grad_weight: &'a mut Tensor,
}

/// The backward of [`split`]: from the gradient of the heads, flat `[padded * count * D]` of the compute kind or wide, to
/// that of the columns from `first` on of `output` `[rows, stride]`, rows past the tokens as zeros.
pub fn join(
    grad: &Tensor,
    norm: Option<NormGradient<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
    first: usize,
) {
    if let Some(kernels) = heads.kernels(output, documents) {
        return join_kernel(kernels, grad, norm, rotation, documents, heads, output, first);
    }
    match (Form::of(output), grad.kind()) {
        (Form::Single, _) => join_fast::<f32, f32>(grad, norm, rotation, documents, heads, output, first),
        (Form::Brain, Kind::Float) => join_fast::<bf16, f32>(grad, norm, rotation, documents, heads, output, first),
        (Form::Brain, _) => join_fast::<bf16, bf16>(grad, norm, rotation, documents, heads, output, first),
        (Form::Aten, _) => join_slow(grad, norm, rotation, documents, heads, output, first),
    }
}

#[allow(clippy::too_many_arguments)]
fn join_kernel(
    kernels: Kernels,
    grad: &Tensor,
    norm: Option<NormGradient<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
    first: usize,
) {
    let slabs = documents.rows.div_ceil(SLAB);
    let name = format!("join_heads_{}_{}_{}", word(output.kind()), word(grad.kind()), heads.pairs());
    let partial =
        norm.as_ref().map(|_| Tensor::empty([slabs as i64, heads.dim as i64], (Kind::Float, output.device())));
    let source = norm.as_ref().map(|n| n.source);
    let from = [
        grad.into(),
        source.map(|s| s.matrix).into(),
        source.map_or(0, |s| s.matrix.size()[1] as usize).into(),
        source.map_or(0, |s| s.first).into(),
    ];
    let to = [
        positions(documents).into(),
        (&*output).into(),
        (output.size()[1] as usize).into(),
        first.into(),
        partial.as_ref().into(),
    ];
    let shape = [documents.rows.into(), heads.count.into(), heads.dim.into(), SLAB.into()];
    let options = options(source.and_then(|s| s.bias), norm.as_ref().map(|n| n.norm), rotation);
    kernels.launch(&name, blocks(slabs, 256), &[&from[..], &options, &to, &shape].concat());
    if let (Some(partial), Some(norm)) = (partial, norm) {
        sum_slabs(kernels, &partial, norm.grad_weight);
    }
}

fn join_fast<C: Narrow, G: Narrow>(
    grad: &Tensor,
    norm: Option<NormGradient<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
    first: usize,
) {
    let stride = output.size()[1] as usize;
    let mut weight_sum = vec![0.0f32; heads.dim];
    join_rows::<C, G>(
        elements(grad),
        norm.as_ref().map(|n| Normed {
            source: elements(n.source.matrix),
            stride: n.source.matrix.size()[1] as usize,
            first: n.source.first,
            bias: n.source.bias.map(elements),
            weight: elements(n.norm.weight),
            eps: n.norm.eps as f32,
        }),
        &mut weight_sum,
        rotation.map(|r| (elements(&r.cos), elements(&r.sin))),
        documents,
        heads,
        elements_mut(output),
        (stride, first),
    );
    if let Some(norm) = norm {
        elements_mut::<f32>(norm.grad_weight).copy_from_slice(&weight_sum);
    }
}

struct Normed<'a, C> {
    source: &'a [C],
    stride: usize,
    first: usize,
    bias: Option<&'a [C]>,
    weight: &'a [C],
    eps: f32,
}

vectorised! {
    fn join_rows<C: Narrow, G: Narrow>(
        grad: &[G],
        norm: Option<Normed<'_, C>>,
        weight_sum: &mut [f32],
        rotation: Option<(&[f32], &[f32])>,
        documents: &Documents,
        heads: Heads,
        output: &mut [C],
        place: (usize, usize),
    ) {
        let ((stride, first), dim, half) = (place, heads.dim, heads.dim / 2);
        let (mut gradient, mut inputs) = (vec![0.0f32; dim], vec![0.0f32; dim]);
        // Partial sums over the heads of a document's token keep long sums accurate.
        let (mut partial, mut partial_of) = (vec![0.0f32; dim], None);
        heads.visit(documents, |token, position, head, offset| {
            let Some(token) = token else { return };
            let from = &grad[offset..offset + dim];
            let gradient = &mut gradient[..dim];
            match rotation {
                None => gradient.iter_mut().zip(from).for_each(|(g, v)| *g = v.load()),
                Some((cos, sin)) => {
                    let (cos, sin) = (&cos[position * half..][..half], &sin[position * half..][..half]);
                    let ((x, y), (gx, gy)) = (from.split_at(half), gradient.split_at_mut(half));
                    for ((((x, y), c), s), (gx, gy)) in
                        x.iter().zip(y).zip(cos).zip(sin).zip(gx.iter_mut().zip(gy))
                    {
                        let (x, y) = (x.load(), y.load());
                        *gx = x * c + y * s;
                        *gy = y * c - x * s;
                    }
                }
            }
            if let Some(norm) = &norm {
                let x = &mut inputs[..dim];
                let at = token * norm.stride + norm.first + head * dim;
                load_head(&norm.source[at..][..dim], norm.bias.map(|b| &b[head * dim..][..dim]), x);
                let rstd = 1.0 / (dot(x, x) / dim as f32 + norm.eps).sqrt();
                let along = product(gradient, x, norm.weight) * rstd / dim as f32;
                if partial_of.replace(token) != Some(token) {
                    for (sum, part) in weight_sum.iter_mut().zip(&mut partial) {
                        *sum += std::mem::take(part);
                    }
                }
                for (((g, x), w), part) in gradient.iter_mut().zip(x).zip(norm.weight).zip(&mut partial) {
                    let unit = *x * rstd;
                    *part += *g * unit;
                    *g = rstd * (*g * w.load() - unit * along);
                }
            }
            let out = &mut output[token * stride + first + head * dim..][..dim];
            out.iter_mut().zip(gradient).for_each(|(o, g)| *o = C::store(*g));
        });
        for (sum, part) in weight_sum.iter_mut().zip(&partial) {
            *sum += part;
        }
        for row in output.chunks_exact_mut(stride).skip(documents.tokens) {
            row[first..first + heads.width()].fill(C::default());
        }
    }
}

/// As [`join`], in ATen calls of any kind.
pub fn join_slow(
    grad: &Tensor,
    norm: Option<NormGradient<'_>>,
    rotation: Option<&Rotation>,
    documents: &Documents,
    heads: Heads,
    output: &mut Tensor,
    first: usize,
) {
    let wide = wide(grad.kind());
    let (tokens, positions, head) = heads.indices(documents, grad);
    let mut rows = grad.view([-1, heads.dim as i64]).to_kind(wide);
    if let Some(rotation) = rotation {
        rows = rotate(&rows, rotation, &positions, -1.0);
    }
    let real = tokens.ge(0).nonzero().squeeze_dim(-1);
    let at = tokens.index_select(0, &real) * heads.count as i64 + head.index_select(0, &real);
    let shape = [documents.rows as i64 * heads.count as i64, heads.dim as i64];
    let mut values = Tensor::zeros(shape, (wide, grad.device())).index_copy(0, &at, &rows.index_select(0, &real));
    if let Some(norm) = norm {
        let x = wide_heads(norm.source, heads, wide).reshape(shape);
        let rstd = (x.square().mean_dim([-1i64].as_slice(), true, wide) + norm.norm.eps).rsqrt();
        let unit = x * &rstd;
        norm.grad_weight.copy_(&(&values * &unit).sum_dim_intlist([0i64].as_slice(), false, wide));
        let scaled = values * norm.norm.weight.to_kind(wide);
        let along = (&scaled * &unit).mean_dim([-1i64].as_slice(), true, wide);
        values = (scaled - unit * along) * rstd;
    }
    output.narrow(1, first as i64, heads.width() as i64).copy_(&values.reshape([documents.rows as i64, -1]));
}
