// Sums of columns in two steps: of each slab of rows, then of all slabs, both first to last.

// partial[slab][column] over the rows of a slab; a thread per column.
template <class C>
__device__ __forceinline__ void sum_slab(const C *matrix, float *partial, int rows, int width, int slab) {
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= width) return;
    const int first = blockIdx.x * slab, end = first + slab < rows ? first + slab : rows;
    float sum = 0.0f;
#pragma unroll 8
    for (int r = first; r < end; r++) sum += load(matrix[(i64)r * width + column]);
    partial[(i64)blockIdx.x * width + column] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
    sum_slab_float(const float *matrix, float *partial, int rows, int width, int slab) {
    sum_slab<float>(matrix, partial, rows, width, slab);
}

extern "C" __global__ void __launch_bounds__(256)
    sum_slab_bf16(const bf16 *matrix, float *partial, int rows, int width, int slab) {
    sum_slab<bf16>(matrix, partial, rows, width, slab);
}

// sums[column] over all slabs: 32 columns a block, each in eight parts.
extern "C" __global__ void __launch_bounds__(256) sum_slabs(const float *partial, float *sums, int slabs, int width) {
    __shared__ float parts[8][32];
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    const int each = (slabs + 7) / 8, first = part * each, end = first + each < slabs ? first + each : slabs;
    float sum = 0.0f;
    if (column < width) {
#pragma unroll 8
        for (int s = first; s < end; s++) sum += partial[(i64)s * width + column];
    }
    parts[part][lane] = sum;
    __syncthreads();
    if (part == 0 && column < width) {
        for (int p = 1; p < 8; p++) sum += parts[p][lane];
        sums[column] = sum;
    }
}
