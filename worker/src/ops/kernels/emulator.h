// Runs CUDA kernels on one thread of a processor, exactly as written: every thread of a block is a fiber, blocks follow
// one another, barriers and shuffles make fibers wait. It exists for tests: slow, and strict. A barrier that some threads
// have left is an error; every other block runs its threads last to first, so that a missing barrier shows.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

using std::fabs;

#define __global__
#define __device__
#define __forceinline__ inline
#define __align__(n) alignas(n)
#define __launch_bounds__(n)
#define __shared__ thread_local
#define DYNAMIC_SHARED(type, name) static thread_local type name[16384]

struct Index {
    int x, y, z;
};
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr int MOST = 1024;
constexpr size_t STACK = 64 << 10;

struct Fiber {
    void *stack;
    void *pointer;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
    bool done;
};

static thread_local Fiber fibers[MOST];
static thread_local void *home;
#if !defined(__x86_64__)
static thread_local ucontext_t home_context;
#endif
static thread_local int current;
static thread_local int finished;
static thread_local void (*body)(void *);
static thread_local void *body_data;
static thread_local const char *fault;
// How often each barrier was passed, and who waits for it now: of the block, then of each warp.
static thread_local unsigned passed[1 + MOST / 32];
static thread_local int waiting[1 + MOST / 32];
static thread_local uint64_t exchange[MOST];

#if defined(__x86_64__)
extern "C" void emulator_switch(void **from, void *to);
asm(".text\n"
    ".type emulator_switch,@function\n"
    "emulator_switch:\n"
    "  push %rbp\n  push %rbx\n  push %r12\n  push %r13\n  push %r14\n  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n  pop %r14\n  pop %r13\n  pop %r12\n  pop %rbx\n  pop %rbp\n"
    "  ret\n");
static void leave() { emulator_switch(&fibers[current].pointer, home); }
static void enter() { emulator_switch(&home, fibers[current].pointer); }
#else
static void leave() { swapcontext(&fibers[current].context, &home_context); }
static void enter() { swapcontext(&home_context, &fibers[current].context); }
#endif

static void start() {
    body(body_data);
    fibers[current].done = true;
    finished++;
    leave();
    abort();
}

static void prepare(int n) {
    Fiber &fiber = fibers[n];
    if (!fiber.stack) fiber.stack = aligned_alloc(64, STACK);
    fiber.done = false;
#if defined(__x86_64__)
    void **top = (void **)((char *)fiber.stack + STACK - 64);
    *--top = nullptr; // as if a call had pushed it: the stack is then aligned as the ABI wants
    *--top = (void *)start;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
#endif
}

static void barrier(int which, int members) {
    if (++waiting[which] == members) {
        waiting[which] = 0;
        passed[which]++;
        return;
    }
    const unsigned before = passed[which];
    while (passed[which] == before && !fault) leave();
    if (fault) leave();
}

static void run_block(int threads, bool backwards) {
    finished = 0;
    for (int n = 0; n < threads; n++) prepare(n);
    memset(waiting, 0, sizeof waiting);
    for (int idle = 0; finished < threads && idle < 3;) {
        const int before = finished;
        unsigned sum = 0;
        for (unsigned p : passed) sum += p;
        for (int i = 0; i < threads; i++) {
            current = backwards ? threads - 1 - i : i;
            if (fibers[current].done) continue;
            threadIdx = {current, 0, 0};
            enter();
        }
        unsigned now = 0;
        for (unsigned p : passed) now += p;
        idle = finished == before && now == sum ? idle + 1 : 0;
    }
    if (finished < threads) fault = "threads wait at a barrier that others have left";
}

template <class T> T shuffle(T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "fits an exchange");
    const int thread = threadIdx.x, warp = thread / 32;
    const int rest = blockDim.x - warp * 32, members = rest < 32 ? rest : 32;
    memcpy(&exchange[thread], &value, sizeof(T));
    barrier(1 + warp, members);
    T result;
    memcpy(&result, &exchange[warp * 32 + from], sizeof(T));
    barrier(1 + warp, members);
    return result;
}

template <class T> struct Code { static constexpr char value = '?'; };
template <class T> struct Code<T *> { static constexpr char value = 'p'; };
template <> struct Code<int> { static constexpr char value = 'i'; };
template <> struct Code<long long> { static constexpr char value = 'l'; };
template <> struct Code<float> { static constexpr char value = 'f'; };
template <> struct Code<double> { static constexpr char value = 'd'; };

template <class... A, size_t... I> void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(A *)arguments[I]...);
}

template <class... A>
const char *launch(void (*kernel)(A...), const char *codes, const int *grid, int threads, void **arguments) {
    const char expected[] = {Code<A>::value..., 0};
    if (strcmp(codes, expected) != 0) return "the arguments are not those of the kernel";
    if (threads < 1 || threads > MOST || threads % 32 != 0) return "a block has whole warps, and at most 1024 threads";
    auto once = [&] { call(kernel, arguments, std::index_sequence_for<A...>()); };
    body = [](void *data) { (*(decltype(once) *)data)(); };
    body_data = &once;
    fault = nullptr;
    blockDim = {threads, 1, 1};
    gridDim = {grid[0], grid[1], 1};
    for (int y = 0; y < grid[1]; y++)
        for (int x = 0; x < grid[0] && !fault; x++) {
            blockIdx = {x, y, 0};
            run_block(threads, (x + y) % 2 != 0);
        }
    return fault;
}

} // namespace emulator

static inline void __syncthreads() { emulator::barrier(0, blockDim.x); }
template <class T> static inline T __shfl_xor_sync(unsigned, T value, int d) {
    return emulator::shuffle(value, (threadIdx.x % 32) ^ d);
}
static inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
static inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
static inline long long __float2ll_rn(float x) { return llrintf(x); }
static inline unsigned atomicMax(unsigned *at, unsigned value) {
    const unsigned before = *at;
    if (value > before) *at = value;
    return before;
}
