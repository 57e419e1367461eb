// Cross-entropy of rows of logits and its gradient in place. One block per row; rows without a target become zero.

template <class C>
__device__ __forceinline__ void classify(C *logits, const int *targets, float scale, double *losses, int vocab) {
    __shared__ float scratch[32];
    C *row = logits + (i64)blockIdx.x * vocab;
    const int target = targets[blockIdx.x];
    if (target < 0) {
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) row[i] = Kind<C>::store(0.0f);
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0;
        return;
    }
    // A first read finds each thread's largest logit and the sum relative to it. A NaN is never larger; it comes back in
    // the sum.
    float most = -3.402823466e38f, sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float x = load(row[i]);
        if (x > most) {
            sum *= expf(most - x);
            most = x;
        }
        sum += expf(x - most);
    }
    const float chosen = load(row[target]);
    const float top = max_of_block(most, scratch);
    sum = sum_of_block(sum * expf(most - top), scratch);
    if (threadIdx.x == 0) losses[blockIdx.x] = (double)top + log((double)sum) - (double)chosen;
    const float share = scale / sum;
#pragma unroll 4
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        const float p = expf(load(row[i]) - top) * share;
        row[i] = Kind<C>::store(i == target ? p - scale : p);
    }
}

extern "C" __global__ void __launch_bounds__(512)
    classify_float(float *logits, const int *targets, float scale, double *losses, int vocab) {
    classify<float>(logits, targets, scale, losses, vocab);
}

extern "C" __global__ void __launch_bounds__(512)
    classify_bf16(bf16 *logits, const int *targets, float scale, double *losses, int vocab) {
    classify<bf16>(logits, targets, scale, losses, vocab);
}
