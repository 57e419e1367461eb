// The exact sum, the norm and AdamW: the same bits as the loops of the host, so state may lie on either side.

// As the host: rounded to nearest, ties to even; what no i64 holds counts as zero (the peak refuses it).
__device__ __forceinline__ i64 units(float leaf) {
    const float x = leaf * 281474976710656.0f; // 2^48
    return fabsf(x) < 9223372036854775808.0f ? __float2ll_rn(x) : 0;
}

__device__ __forceinline__ i64 plus(i64 a, i64 b) { return (i64)((unsigned long long)a + (unsigned long long)b); }

// An element of a gradient: still a sum, or rounded from it.
__device__ __forceinline__ float gradient_of(i64 sum) { return (float)((double)sum * (1.0 / 281474976710656.0)); }
__device__ __forceinline__ float gradient_of(float gradient) { return gradient; }
__device__ __forceinline__ float gradient_of(bf16 gradient) { return load(gradient); }
// What becomes of it before it is used: it stays, or is kept as bf16.
struct Exactly {
    static __device__ __forceinline__ float round(float gradient) { return gradient; }
};
struct Nearest {
    static __device__ __forceinline__ float round(float gradient) { return load(Kind<bf16>::store(gradient)); }
};

// The largest magnitude as bits: those of non-negative floats ascend with their values, infinity and then NaN above them.
__device__ __forceinline__ void raise(u32 *peak, u32 most) {
    for (int d = 16; d > 0; d /= 2) {
        const u32 other = __shfl_xor_sync(0xffffffffu, most, d);
        most = other > most ? other : most;
    }
    if (threadIdx.x % 32 == 0) atomicMax(peak, most);
}

// Adds a leaf to its sums, or sets them to it where it is their first, and raises the peak.
template <class C, int V>
__device__ __forceinline__ void add_leaf(i64 *sums, const C *leaf, i64 count, int first, u32 *peak) {
    u32 most = 0;
    for (i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * V; i < count; i += (i64)gridDim.x * blockDim.x * V) {
        Pack<C, V> x = read<V>(leaf + i);
        Pack<i64, V> total;
        if (first)
            for (int v = 0; v < V; v++) total.at[v] = 0;
        else
            total = read<V>(sums + i);
        for (int v = 0; v < V; v++) {
            const float value = load(x.at[v]);
            const u32 magnitude = __float_as_uint(value) & 0x7fffffffu;
            most = magnitude > most ? magnitude : most;
            total.at[v] = plus(total.at[v], units(value));
        }
        write<V>(sums + i, total);
    }
    raise(peak, most);
}

#define ADD_LEAF(C, V)                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                   \
        add_leaf_##C##_##V(i64 *sums, const C *leaf, i64 count, int first, u32 *peak) { \
        add_leaf<C, V>(sums, leaf, count, first, peak);                                 \
    }
ADD_LEAF(float, 1)
ADD_LEAF(float, 2)
ADD_LEAF(bf16, 1)
ADD_LEAF(bf16, 2)

// Rows of a matrix: leaf [rows, width], to row at[r] each. A row comes once, so nobody else adds to it.
extern "C" __global__ void __launch_bounds__(256)
    add_leaf_rows(i64 *sums, const float *leaf, const int *at, int width, u32 *peak) {
    u32 most = 0;
    i64 *to = sums + (i64)at[blockIdx.x] * width;
    const float *from = leaf + (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const u32 magnitude = __float_as_uint(from[i]) & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
        to[i] = plus(to[i], units(from[i]));
    }
    raise(peak, most);
}

#define ROUND_SUMS(C)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) round_sums_##C(const i64 *sums, C *gradients, i64 count) { \
        for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) \
            gradients[i] = Kind<C>::store(gradient_of(sums[i]));                                             \
    }
ROUND_SUMS(float)
ROUND_SUMS(bf16)

// The sums of one more wave.
extern "C" __global__ void __launch_bounds__(256) add_sums(i64 *sums, const i64 *more, i64 count) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        sums[i] = plus(sums[i], more[i]);
}

// The sum of squares of each chunk of 65,536 gradients, in sixteen lanes; sixteen chunks a block.
template <class G, class R>
__device__ __forceinline__ void squares_of_chunks(const G *gradients, i64 count, double *partials) {
    __shared__ double lanes[256];
    const int lane = threadIdx.x % 16;
    const i64 chunk = (i64)blockIdx.x * 16 + threadIdx.x / 16, first = chunk * 65536;
    const i64 end = first + 65536 < count ? first + 65536 : count;
    double sum = 0.0;
#pragma unroll 8
    for (i64 i = first + lane; i < end; i += 16) {
        const double x = (double)R::round(gradient_of(gradients[i]));
        sum += x * x;
    }
    lanes[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && first < count) {
        double all = 0.0;
        for (int l = 0; l < 16; l++) all += lanes[threadIdx.x + l];
        partials[chunk] = all;
    }
}

struct Scalars {
    float clip, decay, lerp1, beta2, lerp2, root_correction2, eps, negative_step_size;
};

// A master and its moments after one update, from those before it.
__device__ __forceinline__ float advance(const Scalars &s, float gradient, float master, float *m, float *v) {
    gradient = gradient * s.clip;
    const float first = *m + s.lerp1 * (gradient - *m);
    const float second = *v * s.beta2 + s.lerp2 * gradient * gradient;
    const float denominator = sqrtf(second) / s.root_correction2 + s.eps;
    *m = first;
    *v = second;
    return master * s.decay + s.negative_step_size * first / denominator;
}

// The parameters are the masters.
template <class G>
__device__ __forceinline__ void
adamw_whole(const G *gradients, float *parameter, float *m, float *v, i64 count, const Scalars &s) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x)
        parameter[i] = advance(s, gradient_of(gradients[i]), parameter[i], m + i, v + i);
}

// A master is its parameter, rounded with ties away from zero, and its own lower sixteen bits.
template <class G>
__device__ __forceinline__ void
adamw_split(const G *gradients, bf16 *parameter, unsigned short *low, float *m, float *v, i64 count, const Scalars &s) {
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (i64)gridDim.x * blockDim.x) {
        const u32 joined = ((u32)parameter[i] << 16) + (u32)(int)(short)low[i];
        const float next = advance(s, gradient_of(gradients[i]), __uint_as_float(joined), m + i, v + i);
        const u32 bits = __float_as_uint(next);
        parameter[i] = (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)0x7fc0 : (bf16)((bits + 0x8000u) >> 16);
        low[i] = (unsigned short)bits;
    }
}

// Random bits for stochastic rounding: Philox4x32-7, as the host has them. A counter serves two elements.
struct Bits {
    u32 at[4];
};

__device__ __forceinline__ Bits philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
    for (int round = 0; round < 7; round++) {
        const unsigned long long p0 = (unsigned long long)c0 * 0xd2511f53u, p1 = (unsigned long long)c2 * 0xcd9e8d57u;
        c0 = (u32)(p1 >> 32) ^ c1 ^ k0;
        c2 = (u32)(p0 >> 32) ^ c3 ^ k1;
        c1 = (u32)p1;
        c3 = (u32)p0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return {{c0, c1, c2, c3}};
}

// To one of its two neighbours in bf16, to each as often as it is near.
__device__ __forceinline__ bf16 to_either(float value, u32 bits) {
    return (bf16)((__float_as_uint(value) + (bits & 0xffffu)) >> 16);
}

// Parameters and moments are bf16, and there are no masters. The arrays begin with element `begin` of bucket `bucket`; of
// every 32 elements, the first sixteen and the last sixteen share sixteen counters.
template <class G>
__device__ __forceinline__ void adamw_narrow(
    const G *gradients, bf16 *parameter, bf16 *m, bf16 *v, i64 count, i64 begin, i64 seed, i64 step, int bucket,
    const Scalars &s
) {
    const i64 last = (begin + count + 31) / 32 * 16;
    for (i64 c = begin / 32 * 16 + (i64)blockIdx.x * blockDim.x + threadIdx.x; c < last; c += (i64)gridDim.x * blockDim.x) {
        const u32 high = (u32)((unsigned long long)c >> 32) | (u32)bucket << 8;
        const Bits bits = philox(
            (u32)c, high, (u32)step, (u32)((unsigned long long)step >> 32), (u32)seed, (u32)((unsigned long long)seed >> 32)
        );
        for (int half = 0; half < 2; half++) {
            const i64 i = c / 16 * 32 + c % 16 + 16 * half - begin;
            if (i < 0 || i >= count) continue;
            const u32 one = bits.at[2 * half], two = bits.at[2 * half + 1];
            float first = load(m[i]), second = load(v[i]);
            const float gradient = Nearest::round(gradient_of(gradients[i]));
            const float next = advance(s, gradient, load(parameter[i]), &first, &second);
            parameter[i] = to_either(next, one);
            m[i] = to_either(first, one >> 16);
            v[i] = to_either(second, two);
        }
    }
}

#define SQUARES(name, G, R)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) name(const G *gradients, i64 count, double *partials) { \
        squares_of_chunks<G, R>(gradients, count, partials);                                                  \
    }
SQUARES(squares_of_chunks_i64, i64, Exactly)
SQUARES(squares_of_chunks_i64_narrow, i64, Nearest)
SQUARES(squares_of_chunks_float, float, Exactly)
SQUARES(squares_of_chunks_bf16, bf16, Exactly)

#define ADAMW(G)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) adamw_whole_##G(                                              \
        const G *gradients, float *parameter, float *m, float *v, i64 count, float clip, float decay, float lerp1,  \
        float beta2, float lerp2, float root_correction2, float eps, float negative_step_size                       \
    ) {                                                                                                             \
        const Scalars s = {clip, decay, lerp1, beta2, lerp2, root_correction2, eps, negative_step_size};            \
        adamw_whole<G>(gradients, parameter, m, v, count, s);                                                       \
    }                                                                                                               \
    extern "C" __global__ void __launch_bounds__(256) adamw_split_##G(                                              \
        const G *gradients, bf16 *parameter, unsigned short *low, float *m, float *v, i64 count, float clip,        \
        float decay, float lerp1, float beta2, float lerp2, float root_correction2, float eps,                      \
        float negative_step_size                                                                                    \
    ) {                                                                                                             \
        const Scalars s = {clip, decay, lerp1, beta2, lerp2, root_correction2, eps, negative_step_size};            \
        adamw_split<G>(gradients, parameter, low, m, v, count, s);                                                  \
    }
ADAMW(i64)
ADAMW(float)

#define ADAMW_NARROW(G)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256) adamw_narrow_##G(                                            \
        const G *gradients, bf16 *parameter, bf16 *m, bf16 *v, i64 count, i64 begin, i64 seed, i64 step, int bucket, \
        float clip, float decay, float lerp1, float beta2, float lerp2, float root_correction2, float eps,         \
        float negative_step_size                                                                                   \
    ) {                                                                                                            \
        const Scalars s = {clip, decay, lerp1, beta2, lerp2, root_correction2, eps, negative_step_size};           \
        adamw_narrow<G>(gradients, parameter, m, v, count, begin, seed, step, bucket, s);                          \
    }
ADAMW_NARROW(i64)
ADAMW_NARROW(bf16)
