// What all kernels share. They are one program for NVRTC and include no header; the same text is compiled as C++ and run
// on a processor by emulator.h, which is how tests execute it.
//
// Bits depend on shapes alone: sums run in fixed trees over a fixed number of threads, never over atomics (a largest
// value may be found by one, as it does not depend on order), and nothing is fused but what says fmaf.

#ifndef DYNAMIC_SHARED
// What a block shares, of a size that the launch says.
#define DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

typedef unsigned short bf16; // the upper half of a float
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(bf16 x) { return __uint_as_float((u32)x << 16); }

template <class C> struct Kind;
template <> struct Kind<float> {
    static __device__ __forceinline__ float store(float x) { return x; }
};
template <> struct Kind<bf16> {
    // To nearest, ties to even; a NaN stays one.
    static __device__ __forceinline__ bf16 store(float x) {
        u32 bits = __float_as_uint(x);
        return (bits & 0x7fffffffu) > 0x7f800000u ? (bf16)0x7fc0 : (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
};

// V neighbours, read or written at once.
template <class C, int V> struct __align__(sizeof(C) * V) Pack { C at[V]; };

template <int V, class C> __device__ __forceinline__ Pack<C, V> read(const C *from) { return *(const Pack<C, V> *)from; }
template <int V, class C> __device__ __forceinline__ void write(C *to, const Pack<C, V> &values) { *(Pack<C, V> *)to = values; }

// The same sum to every lane.
__device__ __forceinline__ float sum_of_warp(float x) {
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
    return x;
}

__device__ __forceinline__ float max_of_warp(float x) {
    for (int d = 16; d > 0; d /= 2) {
        float other = __shfl_xor_sync(0xffffffffu, x, d);
        x = other > x ? other : x;
    }
    return x;
}

// The same sum to every thread of a block; `scratch` holds 32 floats and is free again afterwards.
__device__ __forceinline__ float sum_of_block(float x, float *scratch) {
    x = sum_of_warp(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int w = 0; w < blockDim.x / 32; w++) sum += scratch[w];
    __syncthreads();
    return sum;
}

__device__ __forceinline__ float max_of_block(float x, float *scratch) {
    x = max_of_warp(x);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float most = scratch[0];
    for (int w = 1; w < blockDim.x / 32; w++) most = scratch[w] > most ? scratch[w] : most;
    __syncthreads();
    return most;
}
