// What of NCCL and of CUDA's driver the collective uses, on a processor, for tests: ranks are threads of one process, memory
// of the device is memory of the host, a stream is a thread that does one thing after another. It is strict where the real
// ones are silently wrong: whoever asks a communicator that is not ready, marks a stream before NCCL has put its kernels on
// it, or uses what has ended, hears of it at once or gets wrong sums.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

enum Result { Success = 0, SystemError = 2, InvalidArgument = 4, InvalidUsage = 5, RemoteError = 6, InProgress = 7 };
enum Fault { None = 0, Hangs = 1, BreaksLater = 2, Refuses = 3, NeverReady = 4 };

void pause() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

[[noreturn]] void misused(const char *how) {
    fprintf(stderr, "stand-in for NCCL and CUDA: %s\n", how);
    abort();
}

std::atomic<int> alive{0}; // streams, events, allocations and communicators
std::atomic<int> polls{0}; // answers "in progress"
thread_local int fault = None;
thread_local std::string last;

// ------------------------------------------------------------------ the driver

struct Stream {
    std::mutex mutex;
    std::condition_variable change;
    std::deque<std::function<void()>> work;
    bool ends = false;
    std::thread thread;

    void put(std::function<void()> task) {
        std::lock_guard<std::mutex> lock(mutex);
        work.push_back(std::move(task));
        change.notify_all();
    }
    void run() {
        for (;;) {
            std::function<void()> task;
            {
                std::unique_lock<std::mutex> lock(mutex);
                change.wait(lock, [&] { return ends || !work.empty(); });
                if (work.empty()) return;
                task = std::move(work.front());
                work.pop_front();
            }
            task();
        }
    }
};

struct Event {
    std::shared_ptr<std::atomic<bool>> passed = std::make_shared<std::atomic<bool>>(false);
};

// Whoever computes is held up while this is set: what it was asked for is not done yet.
std::atomic<bool> held{false};

std::mutex locking;
std::map<uintptr_t, size_t> locked; // Pages of the host, by where they begin.

// Whether memory of the host is locked: all of it or none.
bool is_locked(const void *memory, size_t bytes) {
    std::lock_guard<std::mutex> lock(locking);
    auto begin = (uintptr_t)memory, end = begin + bytes;
    for (auto &[at, length] : locked) {
        if (begin >= at && end <= at + length) return true;
        if (begin < at + length && end > at) misused("a copy of memory that is locked in part");
    }
    return false;
}

// What goes home is slower, so that what comes again overtakes it unless it waits.
void slowly(int milliseconds) { std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds)); }

} // namespace

extern "C" {

int cuDeviceGet(int *device, int index) {
    *device = index;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int) {
    *context = (void *)&alive;
    return 0;
}
int cuCtxSetCurrent(void *context) { return context == (void *)&alive ? 0 : 201; }

int cuStreamCreate(Stream **stream, unsigned flags) {
    if (flags != 1) misused("a stream that runs in turn with the one that computes");
    *stream = new Stream;
    Stream *made = *stream;
    made->thread = std::thread([made] { made->run(); });
    alive++;
    return 0;
}
int cuStreamDestroy_v2(Stream *stream) {
    {
        std::lock_guard<std::mutex> lock(stream->mutex);
        stream->ends = true;
        stream->change.notify_all();
    }
    stream->thread.join();
    delete stream;
    alive--;
    return 0;
}
int cuEventCreate(Event **event, unsigned) {
    *event = new Event;
    alive++;
    return 0;
}
int cuEventDestroy_v2(Event *event) {
    delete event;
    alive--;
    return 0;
}
int cuEventRecord(Event *event, Stream *stream) {
    auto passed = event->passed;
    if (stream)
        stream->put([passed] { *passed = true; });
    else if (!held)
        *passed = true;
    else // On the stream that computes: once it is let go.
        std::thread([passed] {
            while (held) pause();
            *passed = true;
        }).detach();
    return 0;
}
int cuEventQuery(Event *event) { return *event->passed ? 0 : 600; }
int cuEventSynchronize(Event *event) {
    while (!*event->passed) pause();
    return 0;
}
int cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
    auto passed = event->passed;
    if (!stream) { // The emulator computes at once.
        while (!*passed) pause();
        return 0;
    }
    stream->put([passed] {
        while (!*passed) pause();
    });
    return 0;
}
int cuMemAlloc_v2(uint64_t *at, size_t bytes) {
    *at = (uint64_t)malloc(bytes);
    memset((void *)*at, 0xAA, bytes);
    alive++;
    return 0;
}
int cuMemFree_v2(uint64_t at) {
    free((void *)at);
    alive--;
    return 0;
}
int cuMemHostRegister_v2(void *memory, size_t bytes, unsigned) {
    if (fault == Refuses) return 2;
    if (((uintptr_t)memory | bytes) % 4096) misused("memory is locked in whole pages");
    if (is_locked(memory, bytes)) return 712;
    std::lock_guard<std::mutex> lock(locking);
    locked[(uintptr_t)memory] = bytes;
    alive++;
    return 0;
}
int cuMemHostUnregister(void *memory) {
    std::lock_guard<std::mutex> lock(locking);
    if (!locked.erase((uintptr_t)memory)) return 713;
    alive--;
    return 0;
}
// Locked memory is read and written when the stream comes to it.
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, Stream *stream) {
    if (is_locked(from, bytes)) {
        stream->put([=] {
            slowly(1);
            memcpy((void *)to, from, bytes);
        });
        return 0;
    }
    auto copy = std::make_shared<std::vector<char>>((const char *)from, (const char *)from + bytes);
    stream->put([=] { memcpy((void *)to, copy->data(), bytes); });
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, Stream *stream) {
    if (is_locked(to, bytes)) {
        stream->put([=] {
            slowly(4);
            memcpy(to, (const void *)from, bytes);
        });
        return 0;
    }
    auto done = std::make_shared<std::atomic<bool>>(false);
    stream->put([=] {
        memcpy(to, (const void *)from, bytes);
        *done = true;
    });
    while (!*done) pause();
    return 0;
}
int cuGetErrorString(int, const char **words) {
    *words = "the stand-in refuses";
    return 0;
}

} // extern "C"

// ------------------------------------------------------------------ NCCL

namespace {

struct Id {
    char bytes[128];
};

struct Op {
    bool reduces;
    const char *from;
    char *to;
    size_t bytes;
    int root;
    bool same(const Op &other) const { return reduces == other.reduces && bytes == other.bytes && root == other.root; }
};

struct World {
    std::mutex mutex;
    std::condition_variable change;
    int size = 0;
    std::vector<bool> joined;
    std::vector<bool> gone;
    // The n-th group of each rank meets the n-th of the others.
    std::map<long, std::vector<std::vector<Op>>> groups;
    std::map<long, int> finished;
};

struct Comm {
    std::shared_ptr<World> world;
    int rank = 0;
    std::atomic<int> state{InProgress};
    std::atomic<bool> aborted{false}, ended{false}, finalized{false};
    std::atomic<int> under_way{0}, launching{0};
    long count = 0;
    bool never = false;
};

std::mutex registry;
std::map<std::string, std::weak_ptr<World>> worlds;

struct Pending {
    Comm *comm;
    Stream *stream;
    Op op;
};
thread_local int depth = 0;
thread_local std::vector<Pending> pending;

int refuse(int code, const char *why) {
    last = why;
    return code;
}

void must_live(Comm *comm) {
    if (!comm || comm->ended) misused("a communicator is used after its end");
}

int must_be_ready(Comm *comm) {
    must_live(comm);
    if (comm->state == InProgress) return refuse(InvalidUsage, "asked before the communicator was ready");
    return comm->state;
}

// Runs on the stream: waits for everybody's group, and the last to come does all of them.
void carry_out(Comm *comm, std::shared_ptr<World> world, long number, std::vector<Op> ops, int fault) {
    auto waits = [&](std::unique_lock<std::mutex> &lock, auto ready) {
        while (!comm->aborted && !ready()) world->change.wait_for(lock, std::chrono::milliseconds(1));
    };
    std::unique_lock<std::mutex> lock(world->mutex);
    if (fault == BreaksLater) comm->state = RemoteError;
    if (fault == Hangs || fault == BreaksLater) return waits(lock, [] { return false; });
    auto &group = world->groups[number];
    group.resize(world->size);
    group[comm->rank] = ops;
    int &finished = world->finished[number];
    bool all = true;
    for (auto &theirs : group) all = all && !theirs.empty();
    if (all) {
        // Counts that differ hang or spoil memory in NCCL: here they hang.
        for (auto &theirs : group) {
            bool same = theirs.size() == ops.size();
            for (size_t i = 0; same && i < ops.size(); i++) same = theirs[i].same(ops[i]);
            if (!same) return waits(lock, [] { return false; });
        }
        for (size_t i = 0; i < ops.size(); i++) {
            const Op &root = group[ops[i].root][i];
            if (!ops[i].reduces) {
                for (auto &theirs : group)
                    if (theirs[i].to != root.from) memcpy(theirs[i].to, root.from, root.bytes);
                continue;
            }
            std::vector<uint64_t> sum(root.bytes / 8, 0);
            for (auto &theirs : group)
                for (size_t k = 0; k < sum.size(); k++) sum[k] += ((const uint64_t *)theirs[i].from)[k];
            memcpy(root.to, sum.data(), root.bytes);
        }
        finished = 1;
        world->change.notify_all();
    }
    waits(lock, [&] { return finished != 0; });
}

} // namespace

extern "C" {

int ncclGetVersion(int *version) {
    *version = 22809;
    return Success;
}
const char *ncclGetErrorString(int code) {
    switch (code) {
    case InvalidUsage: return "invalid usage";
    case InvalidArgument: return "invalid argument";
    case RemoteError: return "remote process exited or there was a network error";
    default: return "unhandled system error";
    }
}
const char *ncclGetLastError(void *) { return last.c_str(); }

int ncclGetUniqueId(Id *id) {
    static std::atomic<int> made{0};
    for (int i = 0; i < 128; i++) id->bytes[i] = (char)(rand() & 0xff);
    snprintf(id->bytes, 32, "stand-in %d", ++made);
    return Success;
}

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, undefined;
};

int ncclCommInitRankConfig(Comm **comm, int size, Id id, int rank, const Config *config) {
    const Config &given = *config;
    if (given.magic != 0xcafebeef || given.size != 80 || given.version != 22800) misused("a configuration of another NCCL");
    if (given.blocking != 0) misused("a communicator that blocks");
    if (given.undefined != INT32_MIN) misused("a configuration that is not as its initializer has it");
    if (fault == Refuses) return refuse(SystemError, "the stand-in was told to refuse");
    std::shared_ptr<World> world;
    {
        std::lock_guard<std::mutex> lock(registry);
        auto &entry = worlds[std::string(id.bytes, 128)];
        world = entry.lock();
        if (!world) entry = world = std::make_shared<World>();
    }
    std::unique_lock<std::mutex> lock(world->mutex);
    world->size = size;
    world->joined.resize(size);
    world->gone.resize(size);
    if (world->joined[rank]) return refuse(InvalidUsage, "a rank came twice");
    world->joined[rank] = true;
    Comm *made = *comm = new Comm;
    made->world = world;
    made->rank = rank;
    made->never = fault == NeverReady;
    alive++;
    lock.unlock();
    std::thread([made, world] {
        for (;;) {
            pause();
            std::lock_guard<std::mutex> lock(world->mutex);
            if (made->aborted) return;
            bool all = !made->never;
            for (bool joined : world->joined) all = all && joined;
            if (all) break;
        }
        pause();
        made->state = Success;
    }).detach();
    return InProgress;
}

int ncclCommGetAsyncError(Comm *comm, int *state) {
    must_live(comm);
    *state = comm->state;
    if (*state == InProgress) polls++;
    return Success;
}

int ncclGroupStart() {
    depth++;
    return Success;
}

static int ask(Comm *comm, Stream *stream, Op op) {
    if (depth == 0) misused("an operation outside of a group");
    if (int problem = must_be_ready(comm)) return problem;
    if (op.bytes == 0) return refuse(InvalidArgument, "nothing to exchange");
    pending.push_back({comm, stream, op});
    return Success;
}
int ncclReduce(const char *from, char *to, size_t count, int type, int op, int root, Comm *comm, Stream *stream) {
    if (type != 4 || op != 0) return refuse(InvalidArgument, "sums are of i64");
    return ask(comm, stream, {true, from, to, 8 * count, root});
}
int ncclBroadcast(const char *from, char *to, size_t count, int type, int root, Comm *comm, Stream *stream) {
    if (type != 1) return refuse(InvalidArgument, "parameters are bytes");
    return ask(comm, stream, {false, from, to, count, root});
}

int ncclGroupEnd() {
    if (--depth > 0) return Success;
    auto asked = std::move(pending);
    pending.clear();
    if (asked.empty()) return Success;
    Comm *comm = asked[0].comm;
    Stream *stream = asked[0].stream;
    std::vector<Op> ops;
    for (auto &one : asked) ops.push_back(one.op);
    if (fault == Refuses) return refuse(InvalidUsage, "the stand-in was told to refuse");
    comm->state = InProgress;
    auto world = comm->world;
    long number = comm->count++;
    int how = fault;
    comm->under_way++;
    comm->launching++;
    // Kernels come onto the stream later: whatever was put on it before is not behind them.
    std::thread([=] {
        for (int i = 0; i < 3; i++) pause();
        stream->put([=] {
            carry_out(comm, world, number, ops, how);
            comm->under_way--;
        });
        int asked = InProgress; // What breaks on the stream stays broken.
        comm->state.compare_exchange_strong(asked, Success);
        comm->launching--;
    }).detach();
    return InProgress;
}

int ncclCommFinalize(Comm *comm) {
    if (int problem = must_be_ready(comm)) return problem;
    comm->state = InProgress;
    std::thread([comm] {
        while (comm->under_way && !comm->aborted) pause();
        comm->finalized = true;
        comm->state = Success;
    }).detach();
    return InProgress;
}
int ncclCommDestroy(Comm *comm) {
    must_live(comm);
    if (!comm->finalized) misused("a communicator is destroyed before it is finalized");
    comm->ended = true; // Its few bytes stay, so that later use shows.
    comm->world.reset();
    alive--;
    return Success;
}
int ncclCommAbort(Comm *comm) {
    must_live(comm);
    comm->aborted = true;
    comm->ended = true;
    while (comm->launching) pause(); // Nothing of it comes onto a stream any more.
    alive--;
    return Success;
}

// ------------------------------------------------------------------ for tests

// What the next calls of this thread run into.
void stand_in_fault(int kind) { fault = kind; }
// Holds up whoever computes, or lets go.
void stand_in_hold(int holds) { held = holds != 0; }
int stand_in_alive() { return alive; }
int stand_in_polls() { return polls; }

} // extern "C"
