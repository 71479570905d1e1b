// What the CUDA sources of ops/ need of a GPU, for a CPU. Every thread of every thread block is a fiber, all in one
// thread of the host. A fiber runs until it has to wait; the next warp is drawn at random. Asynchronous copies end at
// random.
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>
#include <ucontext.h>

#define EMULATED
#define DEVICE inline
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3_ { unsigned x; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

struct Meeting {  // of n fibers
    int n = 0, arrived = 0;
    unsigned generation = 0;
};
struct Block {
    std::vector<char> memory;
    Meeting all, consumers;
    std::vector<Meeting> warps;
    std::vector<float> shuffled;  // [generation of the warp % 2][thread]
    std::vector<std::array<unsigned, 6>> fragments;  // of mma, as shuffled
};
struct Copy { std::function<void()> run; int bytes; unsigned long long* barrier; };
struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    uint3_ thread, block;
    bool done = false;
    std::deque<std::vector<std::pair<void*, const void*>>> copies{1};  // groups that are not over
    bool reads = false;  // of what a barrier let it see, perhaps under way
};

static std::vector<Fiber> fibers;
static std::vector<Block> blocks;
static std::vector<Meeting> clusters;
static unsigned cluster_size = 1;  // thread blocks
static std::vector<Copy> copies;
static Fiber* current;
static ucontext_t scheduler;
static std::mt19937 random_numbers;
static uint3_ blockDim;
#define threadIdx (current->thread)
#define blockIdx (current->block)

inline void yield() { swapcontext(&current->context, &scheduler); }
inline Block& my_block() { return blocks[blockIdx.x]; }
inline void meet(Meeting& m) {
    unsigned generation = m.generation;
    if (++m.arrived == m.n)
        m.arrived = 0, m.generation++;
    else
        while (m.generation == generation) yield();
}
inline Meeting& my_warp() { return my_block().warps[threadIdx.x / 32]; }
inline void __syncthreads() { meet(my_block().all); }
inline void __syncwarp() { meet(my_warp()); }
inline void sync_consumers() { meet(my_block().consumers); }
template <class T> inline T shuffle(T value, int mask) {  // of 4 bytes
    float* values = my_block().shuffled.data() + my_warp().generation % 2 * blockDim.x;
    memcpy(values + threadIdx.x, &value, 4);
    meet(my_warp());
    return memcpy(&value, values + (threadIdx.x ^ mask), 4), value;
}

inline float of_bf16(unsigned bits) {
    float a;
    return bits <<= 16, memcpy(&a, &bits, 4), a;
}
inline void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    auto* all = my_block().fragments.data() + my_warp().generation % 2 * blockDim.x;
    all[threadIdx.x] = {a0, a1, a2, a3, b0, b1};
    meet(my_warp());
    all += threadIdx.x / 32 * 32;
    unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) {  // c[i]: row g or g + 8, column 2 t or 2 t + 1
            unsigned a = all[g * 4 + k % 8 / 2][i / 2 + k / 8 * 2], b = all[(2 * t + i % 2) * 4 + k % 8 / 2][4 + k / 8];
            c[i] += of_bf16(a >> k % 2 * 16 & 0xffff) * of_bf16(b >> k % 2 * 16 & 0xffff);
        }
}
struct Mapped { const char* start; long long height, width, rows; };  // what a Map holds here
// A tile of rows of 64 columns, whose 16-byte pieces are permuted in each 8 rows; zeros outside of the matrix
inline char* in_tile(const void* tile, int row, int column) {
    return (char*)tile + row * 128 + ((column / 8 ^ row % 8) * 8 + column % 8) * 2;
}
inline void copy_tile(void* to, const void* map, int column, int row, unsigned long long* barrier) {
    Mapped m = *(const Mapped*)map;
    copies.push_back({[=] {
        for (int i = 0; i < m.rows; i++)
            for (int j = 0; j < 64; j++) {
                bool there = row + i < m.height && column + j < m.width;
                unsigned short value = there ? ((unsigned short*)m.start)[(row + i) * m.width + column + j] : 0;
                memcpy(in_tile(to, i, j), &value, 2);
            }
    }, (int)m.rows * 128, barrier});
}
inline void copy_tile_once(void* to, const void* map, int column, int row, unsigned long long* barrier) {
    copy_tile(to, map, column, row, barrier);
}
inline void prefetch(const void*) {}
inline void finish_reads() { current->reads = false; }
inline void wgmma_begin() {}
inline void wgmma_end_of_group() {}
template <int n> inline void wgmma_wait_for_all_but() { finish_reads(); }
template <int n> inline void are_there(float (&)[n][4]) {}
template <int> inline void sync_threads() { sync_consumers(); }
template <int n, class T> inline void wgmma(float (&c)[n][4], const T* a, const T* b, int column) {
    unsigned warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    for (int j = 0; j < n; j++)
        for (unsigned i = 0; i < 4; i++)
            for (int k = column; k < column + 16; k++) {
                unsigned short x, y;
                memcpy(&x, in_tile(a, warp * 16 + g + i / 2 * 8, k), 2);
                memcpy(&y, in_tile(b, j * 8 + 2 * t + i % 2, k), 2);
                c[j][i] += of_bf16(x) * of_bf16(y);
            }
}
inline int cluster_rank() { return blockIdx.x % cluster_size; }
inline void cluster_sync() { meet(clusters[blockIdx.x / cluster_size]); }
inline char* in_cluster(const void* p, int rank) {
    char* there = blocks[blockIdx.x / cluster_size * cluster_size + rank].memory.data();
    char* here = my_block().memory.data();
    auto start = [](char* memory) { return (char*)(((uintptr_t)memory + 127) / 128 * 128); };
    return start(there) + ((char*)p - start(here));
}
inline float of_cluster(const float* p, int rank) { return *(float*)in_cluster(p, rank); }
inline void cluster_arrive() {}
inline void cluster_wait() { cluster_sync(); }
inline void start_next() {}
inline void wait_for_input() {}

// a barrier in shared memory: arrivals expected, arrivals missing, bytes missing, phase
struct Barrier { int16_t arrivals, missing; int32_t bytes : 31; uint32_t phase : 1; };
static_assert(sizeof(Barrier) == 8, "");
inline Barrier& as_barrier(unsigned long long* b) { return *(Barrier*)b; }
inline void settle(Barrier& b) {
    if (b.missing == 0 && b.bytes == 0) b.phase ^= 1, b.missing = b.arrivals;
}
inline void barrier_init(unsigned long long* b, int arrivals) {
    as_barrier(b) = {(int16_t)arrivals, (int16_t)arrivals, 0, 0};
}
inline void arrive(Barrier& b) { b.missing--, settle(b); }
inline void barrier_arrive(unsigned long long* b) {
    if (current->reads) fprintf(stderr, "reads may be under way when their memory is given back\n"), abort();
    arrive(as_barrier(b));
}
inline void barrier_arrive_after(unsigned, unsigned long long* b) { finish_reads(), barrier_arrive(b); }
inline void barrier_expect(unsigned long long* b, int bytes) { as_barrier(b).bytes += bytes, arrive(as_barrier(b)); }
inline void barrier_wait(unsigned long long* b, int phase) {
    while (as_barrier(b).phase == (unsigned)phase) yield();
    current->reads = true;
}
inline bool barrier_done(unsigned long long* b, int phase) { return as_barrier(b).phase != (unsigned)phase; }
inline void copy_async(void* to, const void* from, int bytes, unsigned long long* barrier) {
    if (bytes % 16 || (uintptr_t)to % 16 || (uintptr_t)from % 16)
        fprintf(stderr, "a bulk copy needs 16-byte alignment\n"), abort();
    copies.push_back({[=] { memcpy(to, from, bytes); }, bytes, barrier});
}
inline void copy_16(void* to, const void* from) { current->copies.back().push_back({to, from}); }
inline void end_of_group() { current->copies.emplace_back(); }
template <int n> inline void wait_for_all_but() {
    for (; (int)current->copies.size() > n + 1; current->copies.pop_front())
        for (auto& c : current->copies.front()) memcpy(c.first, c.second, 16);
}
inline void send(float4* to, const float4& value, unsigned long long* barrier, int rank) {
    memcpy(in_cluster(to, rank), &value, 16);
    auto& b = *(Barrier*)in_cluster(barrier, rank);
    b.bytes -= 16, settle(b);
}
inline void pause() { yield(); }
inline void more_registers() {}
inline void fewer_registers() {}
inline void add_release(unsigned long long* counter) { ++*counter; }
inline unsigned long long load_acquire(const unsigned long long* counter) { return *counter; }
inline void add_relaxed(unsigned* counter) { ++*counter; }
inline unsigned load_hint(const unsigned* counter) {  // a hint may be wrong
    return *counter + (random_numbers() % 8 ? 0 : 1 << 20);
}
inline void store_relaxed(unsigned* to, unsigned value) { *to = value; }
inline unsigned load_relaxed(const unsigned* from) { return *from; }
inline void load_relaxed(unsigned (&values)[4], const unsigned* from) { memcpy(values, from, 16); }
inline unsigned shared_bytes() { return my_block().memory.size() - 128; }
inline char* shared_memory() { return (char*)(((uintptr_t)my_block().memory.data() + 127) / 128 * 128); }

template <class T> inline T __ldcg(const T* p) { return *p; }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1 / std::sqrt(a); }

inline float __uint_as_float(unsigned bits) { float a; memcpy(&a, &bits, 4); return a; }
inline unsigned __float_as_uint(float a) { unsigned bits; memcpy(&bits, &a, 4); return bits; }

struct Arguments;
static Arguments* arguments_of_step;
void enter();

extern "C" void launch(int grid, int threads, int shared, int consumers, unsigned seed, void* arguments) {
    arguments_of_step = (Arguments*)arguments;
    random_numbers.seed(seed);
    blockDim.x = threads;
    blocks = std::vector<Block>(grid);
    clusters = std::vector<Meeting>(grid / cluster_size);
    for (auto& c : clusters) c.n = cluster_size * threads;
    fibers = std::vector<Fiber>(grid * threads);
    for (auto& b : blocks) {
        b.memory = std::vector<char>(shared + 128, (char)0xff);  // NaN until something is written
        b.all.n = threads, b.consumers.n = consumers;
        b.warps.resize(threads / 32);
        for (auto& w : b.warps) w.n = 32;
        b.shuffled.resize(2 * threads), b.fragments.resize(2 * threads);
    }
    for (int i = 0; i < grid * threads; i++) {
        Fiber& f = fibers[i];
        f.thread.x = i % threads, f.block.x = i / threads;
        f.stack.reset(new char[1 << 16]);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = 1 << 16, f.context.uc_link = &scheduler;
        makecontext(&f.context, enter, 0);
    }
    for (size_t left = fibers.size(); left;) {
        if (!copies.empty() && random_numbers() % 2 == 0) {
            std::swap(copies[random_numbers() % copies.size()], copies.back());
            Copy c = copies.back();
            copies.pop_back();
            c.run();
            as_barrier(c.barrier).bytes -= c.bytes, settle(as_barrier(c.barrier));
        }
        size_t first = random_numbers() % (fibers.size() / 32) * 32;  // of a warp, which runs until it waits for others
        Block& block = blocks[fibers[first].block.x];
        unsigned met, turns = 1 + random_numbers() % 32;
        Meeting& warp = block.warps[first % threads / 32];
        auto meetings = [&] {
            return block.all.generation + block.consumers.generation + warp.generation
                + clusters[fibers[first].block.x / cluster_size].generation;
        };
        do {
            met = meetings();
            for (size_t i = first; i < first + 32; i++) {
                current = &fibers[first + (i * 13 + turns) % 32];
                if (current->done) continue;
                swapcontext(&scheduler, &current->context);
                left -= current->done;
            }
        } while (--turns && meetings() != met);
    }
}
