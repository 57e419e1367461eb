// silu(gate) * up and its backward in place. Gate and up are rows of `width` that begin `stride` apart.

template <class C, int V>
__device__ __forceinline__ void swiglu_forward(const C *gate, const C *up, C *output, i64 rows, int width, int stride) {
    const int packs = width / V;
    const i64 all = rows * packs;
    for (i64 p = (i64)blockIdx.x * blockDim.x + threadIdx.x; p < all; p += (i64)gridDim.x * blockDim.x) {
        const i64 row = p / packs;
        const int column = (int)(p - row * packs) * V;
        Pack<C, V> g = read<V>(gate + row * stride + column), u = read<V>(up + row * stride + column), y;
        for (int v = 0; v < V; v++) {
            const float x = load(g.at[v]);
            y.at[v] = Kind<C>::store(x / (1.0f + expf(-x)) * load(u.at[v]));
        }
        write<V>(output + row * width + column, y);
    }
}

template <class C, int V>
__device__ __forceinline__ void swiglu_backward(const C *grad, C *gate, C *up, i64 rows, int width, int stride) {
    const int packs = width / V;
    const i64 all = rows * packs;
    for (i64 p = (i64)blockIdx.x * blockDim.x + threadIdx.x; p < all; p += (i64)gridDim.x * blockDim.x) {
        const i64 row = p / packs;
        const int column = (int)(p - row * packs) * V;
        Pack<C, V> d = read<V>(grad + row * width + column);
        Pack<C, V> g = read<V>(gate + row * stride + column), u = read<V>(up + row * stride + column);
        for (int v = 0; v < V; v++) {
            const float dy = load(d.at[v]), x = load(g.at[v]), y = load(u.at[v]);
            const float sigmoid = 1.0f / (1.0f + expf(-x)), silu = x * sigmoid;
            u.at[v] = Kind<C>::store(dy * silu);
            g.at[v] = Kind<C>::store(dy * y * (sigmoid + silu * (1.0f - sigmoid)));
        }
        write<V>(gate + row * stride + column, g);
        write<V>(up + row * stride + column, u);
    }
}

#define SWIGLU(C, V)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        swiglu_forward_##C##_##V(const C *gate, const C *up, C *output, i64 rows, int width, int stride) {            \
        swiglu_forward<C, V>(gate, up, output, rows, width, stride);                                                  \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                 \
        swiglu_backward_##C##_##V(const C *grad, C *gate, C *up, i64 rows, int width, int stride) {                   \
        swiglu_backward<C, V>(grad, gate, up, rows, width, stride);                                                   \
    }
SWIGLU(float, 1)
SWIGLU(float, 4)
SWIGLU(bf16, 1)
SWIGLU(bf16, 8)
