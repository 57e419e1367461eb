// Root-mean-square norm with the residual addition before it, and its backward. One block per row of `width`.

template <class C, int V>
__device__ __forceinline__ void norm_forward(
    const float *input, const C *add, const C *bias, const C *weight, float eps, float *residual, float *rstd, C *output,
    int width
) {
    DYNAMIC_SHARED(float, row); // width
    __shared__ float scratch[32];
    const i64 base = (i64)blockIdx.x * width;
    float squares = 0.0f;
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
        Pack<float, V> x = read<V>(input + base + i);
        if (add) {
            Pack<C, V> a = read<V>(add + base + i);
            for (int v = 0; v < V; v++) x.at[v] += load(a.at[v]) + (bias ? load(bias[i + v]) : 0.0f);
            write<V>(residual + base + i, x);
        }
        for (int v = 0; v < V; v++) {
            row[i + v] = x.at[v];
            squares = fmaf(x.at[v], x.at[v], squares);
        }
    }
    const float scale = 1.0f / sqrtf(sum_of_block(squares, scratch) / width + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
        Pack<C, V> w = read<V>(weight + i), y;
        for (int v = 0; v < V; v++) y.at[v] = Kind<C>::store(row[i + v] * scale * load(w.at[v]));
        write<V>(output + base + i, y);
    }
}

// A block takes `slab` rows one after another and leaves their part of the weight's gradient in row `blockIdx.x` of
// `partial`.
template <class C, int V>
__device__ __forceinline__ void norm_backward(
    const C *grad_output, const float *residual, const float *rstd, const C *weight, float *grad_residual, C *rounded,
    float *partial, int rows, int width, int slab
) {
    DYNAMIC_SHARED(float, sums); // width; each element is one thread's own
    __shared__ float scratch[32];
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V)
        for (int v = 0; v < V; v++) sums[i + v] = 0.0f;
    const int first = blockIdx.x * slab, end = first + slab < rows ? first + slab : rows;
    for (int r = first; r < end; r++) {
        const i64 base = (i64)r * width;
        const float scale = rstd[r];
        float along = 0.0f;
        for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
            Pack<C, V> dy = read<V>(grad_output + base + i), w = read<V>(weight + i);
            Pack<float, V> x = read<V>(residual + base + i);
            for (int v = 0; v < V; v++) along = fmaf(load(dy.at[v]) * load(w.at[v]), x.at[v], along);
        }
        along = sum_of_block(along, scratch) * scale / width;
        for (int i = threadIdx.x * V; i < width; i += blockDim.x * V) {
            Pack<C, V> dy = read<V>(grad_output + base + i), w = read<V>(weight + i), out;
            Pack<float, V> x = read<V>(residual + base + i), dx = read<V>(grad_residual + base + i);
            for (int v = 0; v < V; v++) {
                const float g = load(dy.at[v]), unit = x.at[v] * scale;
                sums[i + v] += g * unit;
                dx.at[v] += scale * (g * load(w.at[v]) - unit * along);
                out.at[v] = Kind<C>::store(dx.at[v]);
            }
            write<V>(grad_residual + base + i, dx);
            write<V>(rounded + base + i, out);
        }
    }
    for (int i = threadIdx.x * V; i < width; i += blockDim.x * V)
        for (int v = 0; v < V; v++) partial[(i64)blockIdx.x * width + i + v] = sums[i + v];
}

#define NORM(C, V)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(256) norm_forward_##C##_##V(                                              \
        const float *input, const C *add, const C *bias, const C *weight, float eps, float *residual, float *rstd,         \
        C *output, int width                                                                                               \
    ) {                                                                                                                    \
        norm_forward<C, V>(input, add, bias, weight, eps, residual, rstd, output, width);                                  \
    }                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) norm_backward_##C##_##V(                                             \
        const C *grad_output, const float *residual, const float *rstd, const C *weight, float *grad_residual, C *rounded, \
        float *partial, int rows, int width, int slab                                                                      \
    ) {                                                                                                                    \
        norm_backward<C, V>(                                                                                               \
            grad_output, residual, rstd, weight, grad_residual, rounded, partial, rows, width, slab                        \
        );                                                                                                                 \
    }
NORM(float, 1)
NORM(float, 4)
NORM(bf16, 1)
NORM(bf16, 4)
