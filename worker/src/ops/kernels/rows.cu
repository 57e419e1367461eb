// Rows of the embedding by id, and its gradient: for each distinct id the sum of its rows, first to last.

template <class C>
__device__ __forceinline__ void look_up(const C *table, const int *ids, float *output, int width) {
    const int id = ids[blockIdx.x];
    float *to = output + (i64)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = id < 0 ? 0.0f : load(table[(i64)id * width + i]);
}

extern "C" __global__ void __launch_bounds__(256) look_up_float(const float *table, const int *ids, float *output, int width) {
    look_up<float>(table, ids, output, width);
}

extern "C" __global__ void __launch_bounds__(256) look_up_bf16(const bf16 *table, const int *ids, float *output, int width) {
    look_up<bf16>(table, ids, output, width);
}

// `order` lists rows id by id; those of the block's id from starts[blockIdx.x] to starts[blockIdx.x + 1].
extern "C" __global__ void __launch_bounds__(256)
    sum_by_id(const float *grad, const int *order, const int *starts, float *sums, int width) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= width) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = starts[blockIdx.x]; i < starts[blockIdx.x + 1]; i++) sum += grad[(i64)order[i] * width + column];
    sums[(i64)blockIdx.x * width + column] = sum;
}
