// From the rows of a projection to heads, token by token, and back: bias, norm of each head, rotary position embedding.
// Head `h` of a row lies at `first + h * dim` of `stride` columns; heads are [rows, heads, dim]. A row at position -1 holds
// no token: its heads, and its gradient, are zero. A warp takes one head of one token, a lane at most P of its pairs: dim is
// even and at most 64 P.

#define EACH_PAIR                                                                                                        \
    _Pragma("unroll") for (int n = 0; n < P; n++)                                                                        \
        if (const int i = lane + 32 * n; i < half)

template <class C, int P>
__device__ __forceinline__ void
load_pairs(const C *from, const C *bias, int half, int lane, float *x, float *y) {
    EACH_PAIR {
        x[n] = load(from[i]) + (bias ? load(bias[i]) : 0.0f);
        y[n] = load(from[i + half]) + (bias ? load(bias[i + half]) : 0.0f);
    }
}

template <int P>
__device__ __forceinline__ float scale_of(const float *x, const float *y, int half, int lane, float eps) {
    float squares = 0.0f;
    EACH_PAIR squares = fmaf(x[n], x[n], fmaf(y[n], y[n], squares));
    return 1.0f / sqrtf(sum_of_warp(squares) / (2 * half) + eps);
}

template <class C, int P>
__device__ __forceinline__ void split_heads(
    const C *source, int stride, int first, const C *bias, const C *weight, float eps, const float *cos, const float *sin,
    const int *positions, C *output, int rows, int heads, int dim
) {
    const int lane = threadIdx.x % 32, half = dim / 2;
    const i64 which = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (which >= (i64)rows * heads) return;
    const int row = (int)(which / heads), head = (int)(which % heads), position = positions[row];
    C *to = output + which * dim;
    float x[P], y[P];
    if (position >= 0) {
        const C *from = source + (i64)row * stride + first + head * dim;
        load_pairs<C, P>(from, bias ? bias + head * dim : bias, half, lane, x, y);
        if (weight) {
            const float scale = scale_of<P>(x, y, half, lane, eps);
            EACH_PAIR {
                x[n] *= scale * load(weight[i]);
                y[n] *= scale * load(weight[i + half]);
            }
        }
    }
    EACH_PAIR {
        float a = 0.0f, b = 0.0f;
        if (position >= 0) {
            const float c = cos ? cos[(i64)position * half + i] : 1.0f, s = sin ? sin[(i64)position * half + i] : 0.0f;
            a = cos ? x[n] * c - y[n] * s : x[n];
            b = cos ? y[n] * c + x[n] * s : y[n];
        }
        to[i] = Kind<C>::store(a);
        to[i + half] = Kind<C>::store(b);
    }
}

// A block takes `slab` rows; `partial` [blocks, dim] receives their part of the gradient of the heads' norm.
template <class C, class G, int P>
__device__ __forceinline__ void join_heads(
    const G *grad, const C *source, int source_stride, int source_first, const C *bias, const C *weight, float eps,
    const float *cos, const float *sin, const int *positions, C *output, int stride, int first, float *partial, int rows,
    int heads, int dim, int slab
) {
    __shared__ float sums[8][64 * P];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, half = dim / 2;
    const int begin = blockIdx.x * slab, end = begin + slab < rows ? begin + slab : rows;
    float weight_x[P], weight_y[P];
    for (int n = 0; n < P; n++) weight_x[n] = weight_y[n] = 0.0f;
    for (int pair = warp; pair < (end - begin) * heads; pair += 8) {
        const int row = begin + pair / heads, head = pair % heads, position = positions[row];
        C *to = output + (i64)row * stride + first + head * dim;
        const G *from = grad + ((i64)row * heads + head) * dim;
        float gx[P], gy[P], x[P], y[P];
        if (position < 0) {
            for (int i = lane; i < dim; i += 32) to[i] = Kind<C>::store(0.0f);
            continue;
        }
        EACH_PAIR {
            const float a = load(from[i]), b = load(from[i + half]);
            const float c = cos ? cos[(i64)position * half + i] : 1.0f, s = sin ? sin[(i64)position * half + i] : 0.0f;
            gx[n] = cos ? a * c + b * s : a;
            gy[n] = cos ? b * c - a * s : b;
        }
        if (weight) {
            const C *input = source + (i64)row * source_stride + source_first + head * dim;
            load_pairs<C, P>(input, bias ? bias + head * dim : bias, half, lane, x, y);
            const float scale = scale_of<P>(x, y, half, lane, eps);
            float along = 0.0f;
            EACH_PAIR
                along = fmaf(gx[n] * load(weight[i]), x[n], fmaf(gy[n] * load(weight[i + half]), y[n], along));
            along = sum_of_warp(along) * scale / dim;
            EACH_PAIR {
                const float unit_x = x[n] * scale, unit_y = y[n] * scale;
                weight_x[n] += gx[n] * unit_x;
                weight_y[n] += gy[n] * unit_y;
                gx[n] = scale * (gx[n] * load(weight[i]) - unit_x * along);
                gy[n] = scale * (gy[n] * load(weight[i + half]) - unit_y * along);
            }
        }
        EACH_PAIR {
            to[i] = Kind<C>::store(gx[n]);
            to[i + half] = Kind<C>::store(gy[n]);
        }
    }
    if (!weight) return;
    EACH_PAIR {
        sums[warp][i] = weight_x[n];
        sums[warp][i + half] = weight_y[n];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        float sum = 0.0f;
        for (int w = 0; w < 8; w++) sum += sums[w][i];
        partial[(i64)blockIdx.x * dim + i] = sum;
    }
}

#define SPLIT(C, P)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) split_heads_##C##_##P(                                              \
        const C *source, int stride, int first, const C *bias, const C *weight, float eps, const float *cos,              \
        const float *sin, const int *positions, C *output, int rows, int heads, int dim                                   \
    ) {                                                                                                                   \
        split_heads<C, P>(source, stride, first, bias, weight, eps, cos, sin, positions, output, rows, heads, dim);       \
    }
#define JOIN(C, G, P)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256) join_heads_##C##_##G##_##P(                                         \
        const G *grad, const C *source, int source_stride, int source_first, const C *bias, const C *weight, float eps,   \
        const float *cos, const float *sin, const int *positions, C *output, int stride, int first, float *partial,       \
        int rows, int heads, int dim, int slab                                                                            \
    ) {                                                                                                                   \
        join_heads<C, G, P>(                                                                                              \
            grad, source, source_stride, source_first, bias, weight, eps, cos, sin, positions, output, stride, first,     \
            partial, rows, heads, dim, slab                                                                               \
        );                                                                                                                \
    }
#define HEADS(P)                                                                                                          \
    SPLIT(float, P)                                                                                                       \
    SPLIT(bf16, P)                                                                                                        \
    JOIN(float, float, P)                                                                                                 \
    JOIN(bf16, float, P)                                                                                                  \
    JOIN(bf16, bf16, P)
HEADS(1)
HEADS(2)
HEADS(4)
