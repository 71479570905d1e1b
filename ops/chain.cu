// The kernels of a decoding step of 5 to 64 sequences: `embed`, `linear` on tensor cores, `attention`.
//
// A step is a chain of these. With programmatic dependent launch a kernel starts while its predecessors still run. It
// requests its weights, and attention the keys and values of earlier steps, before it waits for its input. So memory
// does not idle between kernels.
//
// `linear` is y = act(norm(x) W^T + bias) + residual for TOKENS tokens, a multiple of 8. A cluster of SPLIT thread
// blocks (CTAs) shares the columns of 16 TILES rows, and in each CTA WARPS warps do. mma's 16 rows are weights, its 8
// columns tokens. The columns of its operands may come in any order as long as both agree, so a thread loads 16 bytes
// of each row and these are what it needs for two mmas: it copies its own weights into shared memory, all at once, and
// waits for no other thread before the sums of the warps are added. All sums have one order: a step repeats itself bit
// for bit.
//
// The norm comes after the product: W norm(x) = (W (gain x) - mean W gain) / deviation + W shift. Whoever writes x also
// writes gain x and, for each 16 entries, their moments; W gain and W shift + bias are known before.
//
// The host defines one kernel, LINEAR, WIDE, ATTENTION (for many rows with RING) or EMBED, and its constants.

struct bf16 { unsigned short bits; };
struct alignas(64) Map { u64 words[16]; };  // a tensor map: a matrix, and the size of the tiles that are copied
#define FOUR(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
enum Activation { NONE, GELU, RELU2, SWIGLU };
enum Norm { NO_NORM, LAYER_NORM, RMS_NORM };


// ---------------------------------------------------------------------------------------------------------------------
// What the hardware does, as PTX; on a CPU tests/emulate.h does it

#ifndef EMULATED
DEVICE void copy_16(void* to, const void* from) {  // evict_first: L2 is for activations
    asm volatile("{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, once;\n}"
                 :: "r"(shared_address(to)), "l"(from) : "memory");
}
DEVICE void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> DEVICE void wait_for_all_but() {  // the thread's last n groups of copies
    asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}
DEVICE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <class T> DEVICE T shuffle(T value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void send(float4* to, const float4& value, u64* barrier, int rank) {  // to the same place in another CTA
    asm volatile("{\n.reg .b32 there, signal;\nmapa.shared::cluster.u32 there, %0, %6;\n"
                 "mapa.shared::cluster.u32 signal, %1, %6;\n"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, "
                 "[signal];\n}" :: "r"(shared_address(to)), "r"(shared_address(barrier)), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w), "r"(rank) : "memory");
}
DEVICE float of_cluster(const float* p, int rank) {  // *p in the shared memory of another CTA of the cluster
    float value;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(value) : "r"(shared_address(p)), "r"(rank) : "memory");
    return value;
}
DEVICE void copy_tile(void* to, const Map* map, int column, int row, u64* barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" :: "r"(shared_address(to)), "l"(map), "r"(column), "r"(row),
                 "r"(shared_address(barrier)) : "memory");
}
DEVICE void copy_tile_once(void* to, const Map* map, int column, int row, u64* barrier) {  // evict_first
    asm volatile("{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3}], [%4], once;\n}" :: "r"(shared_address(to)), "l"(map), "r"(column), "r"(row),
                 "r"(shared_address(barrier)) : "memory");
}
DEVICE void copy_async(void* to, const void* from, int bytes, u64* barrier) {  // in bulk, evict_first
    asm volatile("{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], once;\n}" :: "r"(shared_address(to)), "l"(from), "r"(bytes),
                 "r"(shared_address(barrier)) : "memory");
}
DEVICE void prefetch(const Map* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }
// A tile: rows of 64 columns, 128 bytes, whose 16-byte pieces are permuted in each 8 rows (128-byte swizzle)
DEVICE u64 descriptor(const bf16* tile, int column) {
    return (shared_address(tile + column) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
DEVICE void wgmma(float (&c)[8][4], const bf16* a, const bf16* b, int column) {  // 64 rows, 64 tokens, 16 columns
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 1, 1;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
        "%23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, 0;\n}"
        : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]), FOUR(c[4]), FOUR(c[5]), FOUR(c[6]), FOUR(c[7])
        : "l"(descriptor(a, column)), "l"(descriptor(b, column)));
}
DEVICE void wgmma(float (&c)[4][4], const bf16* a, const bf16* b, int column) {  // 32 tokens
    asm volatile(
        "{\n.reg .pred add;\nsetp.eq.b32 add, 1, 1;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, add, 1, 1, 0, 0;\n}"
        : FOUR(c[0]), FOUR(c[1]), FOUR(c[2]), FOUR(c[3]) : "l"(descriptor(a, column)), "l"(descriptor(b, column)));
}
DEVICE void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_end_of_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n> DEVICE void wgmma_wait_for_all_but() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(n) : "memory");
}
template <int n> DEVICE void are_there(float (&c)[n][4]) {  // the compiler moves no use of a sum across this
    UNROLL for (int i = 0; i < n; i++) asm volatile("" : FOUR(c[i]) :: "memory");
}
template <int threads> DEVICE void sync_threads() { asm volatile("bar.sync 1, %0;" :: "n"(threads) : "memory"); }
DEVICE void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE char* shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}
#endif


// ---------------------------------------------------------------------------------------------------------------------
// Numbers

DEVICE float wide(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }
DEVICE unsigned narrow(float a) {  // to the bits of a bf16, to nearest, ties to even
    unsigned bits = __float_as_uint(a);
    return a == a ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
DEVICE float rounded(float a) { return wide((unsigned short)narrow(a)); }

DEVICE void unpack(const uint4& piece, float (&out)[8]) {
    const unsigned bits[4] = {piece.x, piece.y, piece.z, piece.w};
    UNROLL for (int i = 0; i < 4; i++) {
        out[2 * i] = __uint_as_float(bits[i] << 16);
        out[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000);
    }
}
DEVICE uint4 pack(const float (&in)[8]) {
    unsigned bits[4];
    UNROLL for (int i = 0; i < 4; i++) bits[i] = narrow(in[2 * i]) | narrow(in[2 * i + 1]) << 16;
    return uint4{bits[0], bits[1], bits[2], bits[3]};
}
DEVICE const uint4& piece(const bf16* p) { return *(const uint4*)p; }
// What an earlier kernel of the chain wrote is read from L2: a multiprocessor's L1 may hold what stood there before.
DEVICE uint4 fresh(const bf16* p) { return __ldcg((const uint4*)p); }
DEVICE float fresh_value(const bf16* p) { return wide(__ldcg((const unsigned short*)p)); }

template <int n, class T> DEVICE T sum_over(T value) {  // n neighbouring threads
    UNROLL for (int o = n / 2; o; o /= 2) value += shuffle(value, o);
    return value;
}

struct Moments { float mean, squares; };  // of 16 entries of x: their mean, the sum of squares of deviations from it

DEVICE Moments moments_of(float value) {  // of 16 neighbouring threads
    float mean = sum_over<16>(value) / 16;
    return {mean, sum_over<16>((value - mean) * (value - mean))};
}


#ifdef EMBED
// ---------------------------------------------------------------------------------------------------------------------
// A CTA a token: x = wte[token] + wpe[position], gain x, moments of x. BATCH, WIDTH, THREADS, WPE.

struct Arguments {
    const long long *token, *position;
    const bf16 *wte, *wpe, *gain;
    bf16 *x, *scaled;
    Moments* moments;
};

extern "C" __global__ void __launch_bounds__(THREADS) embed(Arguments a) {
    wait_for_input();
    start_next();  // after the wait: so all that ran before this step is over when the next kernels start
    int t = blockIdx.x;
    const bf16* word = a.wte + (t < BATCH ? __ldcg(a.token + t) : 0) * WIDTH;
    const bf16* place = WPE ? a.wpe + (t < BATCH ? __ldcg(a.position + t) : 0) * WIDTH : word;
    for (int start = 0; start < WIDTH; start += THREADS) {
        int i = start + threadIdx.x;
        float value = i < WIDTH && t < BATCH ? wide(word[i].bits) + (WPE ? wide(place[i].bits) : 0) : 0;
        value = rounded(value);
        Moments m = moments_of(value);
        if (i < WIDTH) {
            a.x[t * WIDTH + i].bits = narrow(value);
            a.scaled[t * WIDTH + i].bits = narrow(value * wide(a.gain[i].bits));
        }
        if (i < WIDTH && i % 16 == 0) a.moments[(t * WIDTH + i) / 16] = m;
    }
}
#endif


#if defined(LINEAR) || defined(WIDE)
// ---------------------------------------------------------------------------------------------------------------------
// A linear. TOKENS, ROWS and K of each of BLOCKS blocks, SPREAD, TILES, SPLIT, WARPS, NORM (of x), ACT, BIAS, RESIDUAL
// (also: whether it writes moments and gain y, for the next norm). Block b maps columns b K to (b + 1) K of x. Row j's
// output goes to place j % SPREAD * (all rows / SPREAD) + j / SPREAD.

constexpr int NT = TOKENS / 8, PAIRS = TILES * NT;        // of a tile and 8 tokens
constexpr int ALL = ROWS * BLOCKS, IN = K * BLOCKS, OUT = ACT == SWIGLU ? ALL / 2 : ALL;
constexpr int COLUMNS = K / SPLIT;                        // of a CTA
constexpr int CTAS = (ROWS / 16 + TILES - 1) / TILES;     // clusters of a block
constexpr int OWN = (PAIRS + SPLIT - 1) / SPLIT;          // pairs that a CTA of the cluster finishes
constexpr int EACH = (OWN + WARPS - 1) / WARPS;           // and a warp
constexpr int MINE = NT % SPLIT ? TOKENS : TOKENS / SPLIT;  // tokens of these pairs
constexpr int PARTS = IN / 16;                            // whose moments the norm joins
static_assert(ROWS % 16 == 0, "tiles divide");

struct Arguments {
#ifdef WIDE
    Map of_w, of_x;
#endif
    const bf16 *x, *w, *bias, *gain, *residual;
    const float* of_norm;  // W gain, then W shift + bias, by place
    const Moments* moments;
    bf16 *y, *scaled;
    Moments* new_moments;
    float eps;
};

struct Common {  // of the shared memory of both
    u64 full;
    float bias[16 * TILES], gain[16 * TILES];  // gain: W gain, or the gain of the next norm
    float mean[TOKENS], scale[TOKENS];
    float4 received[SPLIT > 1 ? SPLIT * OWN : 1][32];
};

struct Work {  // of a CTA
    int rank, block, first, tiles;
    DEVICE Work() {
        rank = SPLIT > 1 ? cluster_rank() : 0;
        int cluster = blockIdx.x / SPLIT;
        block = cluster / CTAS, first = cluster % CTAS * TILES;
        tiles = ROWS / 16 % TILES && ROWS / 16 - first < TILES ? ROWS / 16 - first : TILES;
    }
    DEVICE int row(int tile, int i) const {  // of all; swiglu: 8 rows of gates, the 8 values that they belong to
        tile += tile < tiles ? first : 0;
        return block * ROWS + (ACT == SWIGLU ? tile * 8 + i % 8 + i / 8 * (ROWS / 2) : tile * 16 + i);
    }
    DEVICE int place(int row) const { return row % SPREAD * (ALL / SPREAD) + row / SPREAD; }
};

DEVICE void load_vectors(float& gain, float& bias, const Work& work, const Arguments& a) {  // of row threadIdx.x
    int place = work.place(work.row(threadIdx.x / 16, threadIdx.x % 16));
    gain = NORM ? a.of_norm[place] : RESIDUAL ? wide(a.gain[place].bits) : 0;
    bias = NORM ? a.of_norm[ALL + place] : BIAS ? wide(a.bias[place].bits) : 0;
}

DEVICE void expect_sums(Common& shared, const Work& work) {  // of the cluster
    barrier_init(&shared.full, 1);
    barrier_expect(&shared.full, (PAIRS - work.rank + SPLIT - 1) / SPLIT * SPLIT * 512);
}

template <int warps>
DEVICE void join_moments(Common& shared, const Work& work, const Arguments& a, int warp) {  // a warp a token
    int lane = threadIdx.x % 32;
    _Pragma("unroll 4") for (int i = 0; i < (MINE + warps - 1) / warps; i++) {
        int t = i * warps + warp < MINE ? i * warps + warp : MINE - 1;
        if (MINE < TOKENS) t = (t / 8 * SPLIT + work.rank) * 8 + t % 8;
        float mean = 0, squares = 0;
        Moments m[(PARTS + 31) / 32];
        UNROLL for (int i = 0; i < (PARTS + 31) / 32; i++) {
            bool there = i * 32 + lane < PARTS;
            float2 read = there ? __ldcg((const float2*)a.moments + t * PARTS + i * 32 + lane) : float2{0, 0};
            m[i] = {read.x, read.y};
            mean += m[i].mean;
        }
        mean = NORM == LAYER_NORM ? sum_over<32>(mean) / PARTS : 0;
        UNROLL for (int i = 0; i < (PARTS + 31) / 32; i++)
            if (i * 32 + lane < PARTS) squares += m[i].squares + 16 * (m[i].mean - mean) * (m[i].mean - mean);
        squares = sum_over<32>(squares);
        if (lane == 0) shared.mean[t] = mean, shared.scale[t] = rsqrtf(squares / IN + a.eps);
    }
}

DEVICE float activate(float a) {
    if (ACT == RELU2) return a > 0 ? a * a : 0;
    if (ACT == GELU) return a / (1 + __expf(-1.5957691216f * (a + 0.044715f * a * a * a)));  // tanh form
    return a;
}

DEVICE float4 plus(const float4& a, const float4& b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Of the cluster: pair p belongs to CTA p % SPLIT, and there to warp p / SPLIT % WARPS.
DEVICE float4 sum_of_cluster(Common& shared, int own) {
    float4 sum = {0, 0, 0, 0};
    UNROLL for (int r = 0; r < SPLIT; r++) sum = plus(sum, shared.received[r * OWN + own][threadIdx.x % 32]);
    return sum;
}

DEVICE void load_residual(float (&residual)[4], const Work& work, const Arguments& a, int pair) {
    int lane = threadIdx.x % 32, tile = pair / NT;
    UNROLL for (int i = 0; i < 4; i++) {
        int token = pair % NT * 8 + lane % 4 * 2 + i % 2;
        if (pair < PAIRS && tile < work.tiles)
            residual[i] = fresh_value(a.residual + token * OUT + work.place(work.row(tile, lane / 4 + i / 2 * 8)));
    }
}

// A thread's share of a pair: rows g and g + 8 of a tile, for two tokens each
DEVICE void finish(const Common& shared, const Work& work, const Arguments& a, int pair, const float4& sum,
                   const float (&residual)[4]) {
    int g = threadIdx.x % 32 / 4, tile = pair / NT, t = pair % NT * 8 + threadIdx.x % 4 * 2;
    float value[4] = {sum.x, sum.y, sum.z, sum.w};
    UNROLL for (int i = 0; i < 4; i++) {
        int row = tile * 16 + g + i / 2 * 8, token = t + i % 2;
        if (NORM) value[i] = (value[i] - shared.mean[token] * shared.gain[row]) * shared.scale[token];
        value[i] = activate(value[i] + shared.bias[row]) + residual[i];
    }
    UNROLL for (int i = 0; i < (ACT == SWIGLU ? 2 : 4); i++) {
        if (ACT == SWIGLU) value[i] = value[i] / (1 + __expf(-value[i])) * value[i + 2];
        int place = (t + i % 2) * OUT + work.place(work.row(tile, g + i / 2 * 8));
        a.y[place].bits = narrow(value[i]);
        if (RESIDUAL) a.scaled[place].bits = narrow(rounded(value[i]) * shared.gain[tile * 16 + g + i / 2 * 8]);
    }
    if (RESIDUAL)
        UNROLL for (int i = 0; i < 2; i++) {
            float upper = rounded(value[i]), lower = rounded(value[i + 2]), sum = upper + lower;
            UNROLL for (int o = 4; o < 32; o *= 2) sum += shuffle(sum, o);
            float mean = sum / 16, squares = (upper - mean) * (upper - mean) + (lower - mean) * (lower - mean);
            UNROLL for (int o = 4; o < 32; o *= 2) squares += shuffle(squares, o);
            int part = (t + i) * (ALL / 16) + work.block * ROWS / 16 + work.first + tile;
            if (g == 0) a.new_moments[part] = {mean, squares};
        }
}
#endif


#ifdef LINEAR
// With LINEAR: weights in registers' order, mma.
constexpr int THREADS = 32 * WARPS, CHUNKS = (COLUMNS / 32 + WARPS - 1) / WARPS;  // of a warp, 32 columns each
constexpr int BESIDE = COLUMNS % (64 * WARPS) ? 1 : 2;    // chunks of a warp that lie side by side: whole lines of L2
constexpr int AHEAD = CHUNKS < 16 / NT ? CHUNKS : 16 / NT;  // chunks of x that a warp loads ahead
constexpr int AREA = CHUNKS * TILES * 2 > PAIRS ? CHUNKS * TILES * 2 : PAIRS;  // of a warp, 512 bytes each
static_assert(COLUMNS % 32 == 0 && TILES <= 2 * WARPS, "tiles divide");

struct Shared : Common {
    alignas(128) uint4 area[WARPS][AREA][32];
};
extern "C" __device__ const int needed_bytes = sizeof(Shared);

DEVICE int column_of(int chunk) {
    return ((chunk / BESIDE * WARPS + threadIdx.x / 32) * BESIDE + chunk % BESIDE) * 32 + threadIdx.x % 4 * 8;
}

DEVICE bool there(int chunk) { return COLUMNS % (32 * WARPS) == 0 || column_of(chunk) < COLUMNS; }

DEVICE void request_weights(uint4 (&area)[AREA][32], const Work& work, const bf16* w) {
    int lane = threadIdx.x % 32;
    w += work.rank * COLUMNS;
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        UNROLL for (int tile = 0; tile < TILES; tile++)
            UNROLL for (int half = 0; half < 2; half++)
                if (tile < work.tiles && there(c))
                    copy_16(&area[(c * TILES + tile) * 2 + half][lane],
                            w + (long long)work.row(tile, lane / 4 + 8 * half) * K + column_of(c));
        end_of_group();
    }
}

DEVICE void load_x(uint4 (&x)[NT], const bf16* from, int chunk) {
    UNROLL for (int n = 0; n < NT; n++)
        x[n] = there(chunk) ? fresh(from + n * 8 * IN + column_of(chunk)) : uint4{0, 0, 0, 0};
}

template <int c>
DEVICE void multiply(float (&sums)[TILES][NT][4], uint4 (&x)[AHEAD][NT], const uint4 (&area)[AREA][32],
                     const bf16* from) {
    int lane = threadIdx.x % 32;
    wait_for_all_but<CHUNKS - 1 - c>();
    if (there(c))
        UNROLL for (int tile = 0; tile < TILES; tile++) {
            uint4 upper = area[(c * TILES + tile) * 2][lane], lower = area[(c * TILES + tile) * 2 + 1][lane];
            UNROLL for (int n = 0; n < NT; n++) {
                const uint4& b = x[c % AHEAD][n];
                mma(sums[tile][n], upper.x, lower.x, upper.y, lower.y, b.x, b.y);
                mma(sums[tile][n], upper.z, lower.z, upper.w, lower.w, b.z, b.w);
            }
        }
    if constexpr (c + AHEAD < CHUNKS) load_x(x[c % AHEAD], from, c + AHEAD);
    if constexpr (c + 1 < CHUNKS) multiply<c + 1>(sums, x, area, from);
}

DEVICE float4 sum_of_warps(Shared& shared, int pair) {
    float4 sum = {0, 0, 0, 0};
    UNROLL for (int w = 0; w < WARPS; w++) sum = plus(sum, *(const float4*)&shared.area[w][pair][threadIdx.x % 32]);
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) linear(Arguments a) {
    Shared& shared = *(Shared*)shared_memory();
    Work work;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    start_next();
    request_weights(shared.area[warp], work, a.w);
    if (SPLIT > 1) {
        if (threadIdx.x == 0) expect_sums(shared, work);
        __syncwarp();
        cluster_arrive();
    }
    float gain = 0, bias = 0;
    if (threadIdx.x < 16 * TILES) load_vectors(gain, bias, work, a);
    wait_for_input();

    const bf16* from = a.x + lane / 4 * IN + work.block * K + work.rank * COLUMNS;
    uint4 x[AHEAD][NT];
    UNROLL for (int c = 0; c < AHEAD; c++) load_x(x[c], from, c);
    float residual[EACH][4] = {};
    if (RESIDUAL)
        UNROLL for (int e = 0; e < EACH; e++)
            load_residual(residual[e], work, a, (e * WARPS + warp) * SPLIT + work.rank);
    if (NORM) join_moments<WARPS>(shared, work, a, warp);
    if (threadIdx.x < 16 * TILES) shared.bias[threadIdx.x] = bias, shared.gain[threadIdx.x] = gain;
    float sums[TILES][NT][4] = {};
    multiply<0>(sums, x, shared.area[warp], from);
    UNROLL for (int tile = 0; tile < TILES; tile++)
        UNROLL for (int n = 0; n < NT; n++)
            *(float4*)&shared.area[warp][tile * NT + n][lane] =
                float4{sums[tile][n][0], sums[tile][n][1], sums[tile][n][2], sums[tile][n][3]};
    __syncthreads();
    if (SPLIT > 1) {
        cluster_wait();  // the others' barriers are there
        for (int pair = warp; pair < PAIRS; pair += WARPS)
            send(&shared.received[work.rank * OWN + pair / SPLIT][lane], sum_of_warps(shared, pair), &shared.full,
                 pair % SPLIT);
        barrier_wait(&shared.full, 0);
    }
    UNROLL for (int e = 0; e < EACH; e++) {
        int own = e * WARPS + warp, pair = own * SPLIT + work.rank;
        if (PAIRS % (SPLIT * WARPS) && pair >= PAIRS || pair / NT >= work.tiles) continue;
        float4 sum = SPLIT > 1 ? sum_of_cluster(shared, own) : sum_of_warps(shared, pair);
        finish(shared, work, a, pair, sum, residual[e]);
    }
}
#endif

#ifdef WIDE
// ---------------------------------------------------------------------------------------------------------------------
// The same linear for many tokens, on wgmma: a group of four warps multiplies 64 rows by N tokens (at least
// TOKENS), both from shared memory. Two more warps have it filled, in W_STAGES and X_STAGES tiles of 64 columns:
// weights as soon as there is room, x when it is there. So x comes once for each CTA, not once for each warp. Before a
// norm four more join the moments meanwhile. WARPS is TILES.

constexpr int JOINING = NORM ? 4 : 0, THREADS = 32 * (WARPS + 2 + JOINING), CHUNKS = COLUMNS / 64;
static_assert(COLUMNS % 64 == 0 && ROWS % (16 * TILES) == 0 && TILES % 4 == 0 && WARPS == TILES, "tiles divide");
static_assert(CHUNKS == 1 || W_STAGES > 1 && X_STAGES > 1, "a tile is free when the product with the next has begun");

struct Shared : Common {
    u64 w_full[W_STAGES], w_free[W_STAGES], x_full[X_STAGES], x_free[X_STAGES];
    alignas(1024) bf16 w[W_STAGES][16 * TILES * 64];
    alignas(1024) bf16 x[X_STAGES][N * 64];
};
extern "C" __device__ const int needed_bytes = sizeof(Shared);

DEVICE void init_barriers(Shared& shared, const Work& work) {
    for (int i = 0; i < W_STAGES; i++) barrier_init(&shared.w_full[i], 1), barrier_init(&shared.w_free[i], WARPS);
    for (int i = 0; i < X_STAGES; i++) barrier_init(&shared.x_full[i], 1), barrier_init(&shared.x_free[i], WARPS);
    if (SPLIT > 1) expect_sums(shared, work);
}

DEVICE void load_weights(Shared& shared, const Work& work, const Arguments& a) {
    const Map* map = &a.of_w;
    for (int c = 0; c < CHUNKS; c++) {
        int stage = c % W_STAGES, column = work.rank * COLUMNS + c * 64;
        if (c >= W_STAGES) barrier_wait(&shared.w_free[stage], c / W_STAGES - 1 & 1);
        barrier_expect(&shared.w_full[stage], sizeof(shared.w[stage]));
        if (ACT == SWIGLU)
            for (int i = 0; i < 2 * TILES; i++)  // 8 rows
                copy_tile_once(shared.w[stage] + i * 512, map, column, work.row(i / 2, i % 2 * 8),
                               &shared.w_full[stage]);
        else
            copy_tile_once(shared.w[stage], map, column, work.row(0, 0), &shared.w_full[stage]);
    }
}

DEVICE void load_x(Shared& shared, const Work& work, const Map* map) {
    for (int c = 0; c < CHUNKS; c++) {
        int stage = c % X_STAGES;
        if (c >= X_STAGES) barrier_wait(&shared.x_free[stage], c / X_STAGES - 1 & 1);
        barrier_expect(&shared.x_full[stage], sizeof(shared.x[stage]));
        copy_tile(shared.x[stage], map, work.block * K + work.rank * COLUMNS + c * 64, 0, &shared.x_full[stage]);
    }
}

DEVICE void release(Shared& shared, int c) {
    if (threadIdx.x % 32) return;
    if (CHUNKS > W_STAGES) barrier_arrive(&shared.w_free[c % W_STAGES]);
    if (CHUNKS > X_STAGES) barrier_arrive(&shared.x_free[c % X_STAGES]);
}

DEVICE void multiply(float (&sums)[N / 8][4], Shared& shared) {
    int rows = threadIdx.x / 128 * 64;
    are_there(sums);  // the zeros, before wgmma_begin
    for (int c = 0; c < CHUNKS; c++) {
        barrier_wait(&shared.w_full[c % W_STAGES], c / W_STAGES & 1);
        barrier_wait(&shared.x_full[c % X_STAGES], c / X_STAGES & 1);
        wgmma_begin();
        UNROLL for (int column = 0; column < 64; column += 16)
            wgmma(sums, shared.w[c % W_STAGES] + rows * 64, shared.x[c % X_STAGES], column);
        wgmma_end_of_group();
        wgmma_wait_for_all_but<1>();
        if (c > 0) release(shared, c - 1);
    }
    wgmma_wait_for_all_but<0>();
    are_there(sums);
}

DEVICE int pair_of(const Work& work, int e) {
    return SPLIT > 1 ? (e * WARPS + threadIdx.x / 32) * SPLIT + work.rank : threadIdx.x / 32 * NT + e;
}

DEVICE void compute(Shared& shared, const Work& work, const Arguments& a) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float gain = 0, bias = 0;
    if (threadIdx.x < 16 * TILES) {
        load_vectors(gain, bias, work, a);
        shared.bias[threadIdx.x] = bias, shared.gain[threadIdx.x] = gain;
    }
    wait_for_input();
    float residual[EACH][4] = {};
    if (RESIDUAL)
        UNROLL for (int e = 0; e < EACH; e++) load_residual(residual[e], work, a, pair_of(work, e));
    float sums[N / 8][4] = {};
    multiply(sums, shared);
    sync_threads<32 * (WARPS + JOINING)>();  // vectors and moments are there
    if (SPLIT > 1) {
        cluster_wait();  // the others' barriers are there
        UNROLL for (int n = 0; n < NT; n++) {
            int pair = warp * NT + n;
            send(&shared.received[work.rank * OWN + pair / SPLIT][lane],
                 float4{sums[n][0], sums[n][1], sums[n][2], sums[n][3]}, &shared.full, pair % SPLIT);
        }
        barrier_wait(&shared.full, 0);
    }
    UNROLL for (int e = 0; e < EACH; e++) {
        int pair = pair_of(work, e);
        if (pair >= PAIRS) continue;
        float4 sum = SPLIT > 1 ? sum_of_cluster(shared, e * WARPS + warp)
                               : float4{sums[e][0], sums[e][1], sums[e][2], sums[e][3]};
        finish(shared, work, a, pair, sum, residual[e]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) linear(const __grid_constant__ Arguments a) {
    Shared& shared = *(Shared*)shared_memory();
    Work work;
    start_next();
    if (threadIdx.x == 32 * WARPS) init_barriers(shared, work);
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();
    if (threadIdx.x < 32 * WARPS) return compute(shared, work, a);
    if (threadIdx.x == 32 * WARPS) load_weights(shared, work, a);
    if (threadIdx.x == 32 * WARPS + 32) {
        prefetch(&a.of_x);
        wait_for_input();
        load_x(shared, work, &a.of_x);
    }
    if (NORM && threadIdx.x >= 32 * (WARPS + 2)) {
        wait_for_input();
        join_moments<4>(shared, work, a, threadIdx.x / 32 - WARPS - 2);
        sync_threads<32 * (WARPS + JOINING)>();
    }
    __syncwarp();
    if (SPLIT > 1) cluster_wait();
}
#endif


#ifdef ATTENTION
// ---------------------------------------------------------------------------------------------------------------------
// Attention of one new token a row. A cluster of SPLIT CTAs for each of UNITS pairs of a row and a key head, with its
// GROUP query heads. HEADS, KV, D, WARPS, PASS, SPLIT, ROPE, SCALE. D / 8 threads, a team, share a place; it loads PASS
// places at once. BY_LENGTH: long rows come first, so that none begins when the others end.

constexpr int THREADS = 32 * WARPS, GROUP = HEADS / KV, MEMBERS = D / 8, TEAMS = THREADS / MEMBERS, ROWS = UNITS / KV;
constexpr float LEAST = -1e30f;  // a score of nothing

struct Arguments {
    const bf16* qkv;
    const float *cos, *sin;
    const long long* position;
    bf16 *k, *v, *y;
    long long length;  // of the cache
};

struct Row { int row; long long place; };

DEVICE Row row_at(int rank, const long long* position) {  // in order, or the one that `rank` rows are longer than
    if (!BY_LENGTH) return {rank, __ldcg(position + rank)};
    constexpr int MANY = (ROWS + 31) / 32;  // rows of a thread of a warp
    int key[MANY], longer[MANY] = {}, found = 0;
    UNROLL for (int n = 0; n < MANY; n++) {
        int row = n * 32 + threadIdx.x % 32;
        key[n] = row < ROWS ? (int)__ldcg(position + row) * ROWS + row : 0;  // no two rows' are equal
    }
    _Pragma("unroll 8") for (int o = 0; o < (ROWS > 16 ? 32 : 16); o++)
        UNROLL for (int i = 0; i < MANY; i++) {
            int other = shuffle(key[i], o);
            UNROLL for (int n = 0; n < MANY; n++) longer[n] += other > key[n];
        }
    UNROLL for (int n = 0; n < MANY; n++) found += longer[n] == rank ? key[n] : 0;
    found = sum_over<32>(found);
    return {found % ROWS, found / ROWS};
}

DEVICE float dot(const float (&a)[8], const float (&b)[8]) {
    float sum = 0;
    UNROLL for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    return sum_over<MEMBERS>(sum);
}

struct Softmax {  // a running one, over the places of a team
    float top[GROUP], total[GROUP], out[GROUP][8];

    DEVICE Softmax(const float (&q)[GROUP][8], const float (&k)[8], const float (&v)[8], bool first) {
        UNROLL for (int g = 0; g < GROUP; g++) {  // the first team begins with the new token
            float score = dot(q[g], k);
            top[g] = first ? score : LEAST, total[g] = first;
            UNROLL for (int i = 0; i < 8; i++) out[g][i] = first ? v[i] : 0;
        }
    }
    DEVICE void add(float other_top, float other_total, const float (&other)[8], int g) {
        float most = top[g] > other_top ? top[g] : other_top;
        float mine = __expf(top[g] - most), theirs = __expf(other_top - most);
        top[g] = most, total[g] = total[g] * mine + other_total * theirs;
        UNROLL for (int i = 0; i < 8; i++) out[g][i] = out[g][i] * mine + other[i] * theirs;
    }
};

// 8 entries of a vector turned by its position, as model.rotate: x cos + (halves swapped) sin
DEVICE void rotated(float (&out)[8], const bf16* vector, int m, const float (&c)[8], const float (&s)[8]) {
    float other[8];
    unpack(fresh(vector + m * 8), out);
    if (ROPE) {
        unpack(fresh(vector + (m ^ MEMBERS / 2) * 8), other);
        UNROLL for (int i = 0; i < 8; i++) out[i] = rounded(out[i] * c[i] + other[i] * s[i]);
    }
}

DEVICE void load_places(uint4 (&out)[PASS], const bf16* from, long long first, long long stop) {
    UNROLL for (int p = 0; p < PASS; p++) {
        long long l = first + p * TEAMS * SPLIT;
        out[p] = l < stop ? fresh(from + l * D) : uint4{0, 0, 0, 0};
    }
}

DEVICE void attend(Softmax& state, const float (&q)[GROUP][8], const uint4 (&k)[PASS], const uint4 (&v)[PASS],
                   long long first, long long stop) {
    float score[PASS][GROUP], weight[GROUP], most[GROUP], a[8];
    UNROLL for (int g = 0; g < GROUP; g++) most[g] = state.top[g];
    UNROLL for (int p = 0; p < PASS; p++) {
        unpack(k[p], a);
        UNROLL for (int g = 0; g < GROUP; g++) {
            score[p][g] = dot(q[g], a);
            if (first + p * TEAMS * SPLIT >= stop) score[p][g] = LEAST;
            most[g] = most[g] > score[p][g] ? most[g] : score[p][g];
        }
    }
    UNROLL for (int g = 0; g < GROUP; g++) {
        float fade = __expf(state.top[g] - most[g]);
        state.top[g] = most[g], state.total[g] *= fade;
        UNROLL for (int i = 0; i < 8; i++) state.out[g][i] *= fade;
    }
    UNROLL for (int p = 0; p < PASS; p++) {
        unpack(v[p], a);
        UNROLL for (int g = 0; g < GROUP; g++) {
            weight[g] = score[p][g] == LEAST ? 0 : __expf(score[p][g] - most[g]);
            state.total[g] += weight[g];
            UNROLL for (int i = 0; i < 8; i++) state.out[g][i] += weight[g] * a[i];
        }
    }
}

struct Parts {  // of the warps
    float out[WARPS][GROUP][D], top[WARPS][GROUP], total[WARPS][GROUP];
};

DEVICE void publish(Softmax& state, Parts& parts) {
    int warp = threadIdx.x / 32, m = threadIdx.x % MEMBERS;
    UNROLL for (int g = 0; g < GROUP; g++) {
        UNROLL for (int o = MEMBERS; o < 32; o *= 2) {  // the teams of a warp
            float other[8];
            UNROLL for (int i = 0; i < 8; i++) other[i] = shuffle(state.out[g][i], o);
            float top = shuffle(state.top[g], o), total = shuffle(state.total[g], o);
            state.add(top, total, other, g);
        }
        if (threadIdx.x % 32 < MEMBERS) {
            UNROLL for (int i = 0; i < 8; i++) parts.out[warp][g][m * 8 + i] = state.out[g][i];
            parts.top[warp][g] = state.top[g], parts.total[warp][g] = state.total[g];
        }
    }
}

DEVICE float joined(const Parts& parts, int g, int d) {  // an entry of the output, of all warps of the cluster
    float top = LEAST, total = 0, out = 0;
    UNROLL for (int r = 0; r < SPLIT; r++)
        UNROLL for (int w = 0; w < WARPS; w++) {
            auto there = [&](const float* p) { return SPLIT > 1 ? of_cluster(p, r) : *p; };
            float new_top = there(&parts.top[w][g]), most = top > new_top ? top : new_top;
            float mine = __expf(top - most), theirs = __expf(new_top - most);
            total = total * mine + there(&parts.total[w][g]) * theirs;
            out = out * mine + there(&parts.out[w][g][d]) * theirs, top = most;
        }
    return out / total;
}

#ifndef RING
// DEPTH buffers of PASS places: while one is attended to, loads of the others are under way. With more than one,
// registers must be few enough for two CTAs a multiprocessor.
constexpr int STEP = PASS * TEAMS * SPLIT;
constexpr int EACH = (GROUP * D + SPLIT * THREADS - 1) / (SPLIT * THREADS);  // results of a thread

struct Shared : Parts {};
extern "C" __device__ const int needed_bytes = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(THREADS, DEPTH > 1 ? 2 : 0) attention(Arguments a) {
    Shared& shared = *(Shared*)shared_memory();
    int rank = SPLIT > 1 ? cluster_rank() : 0, head = blockIdx.x / SPLIT % KV;
    int m = threadIdx.x % MEMBERS, team = rank * TEAMS + threadIdx.x / MEMBERS;
    start_next();
    // Before the wait: places that earlier steps wrote, and the position, which the step before this one set
    const auto [row, place] = row_at(blockIdx.x / SPLIT / KV, a.position);
    long long first = team;
    bf16 *keys = a.k + (row * KV + head) * a.length * D + m * 8, *values = a.v + (keys - a.k);
    uint4 k[DEPTH][PASS], v[DEPTH][PASS];
    UNROLL for (int b = 0; b < DEPTH; b++) {
        load_places(k[b], keys, first + b * STEP, place);
        load_places(v[b], values, first + b * STEP, place);
    }
    float c[8] = {}, s[8] = {};
    if (ROPE)
        UNROLL for (int i = 0; i < 8; i++) c[i] = a.cos[place * D + m * 8 + i], s[i] = a.sin[place * D + m * 8 + i];
    wait_for_input();

    const bf16* qkv = a.qkv + row * (HEADS + 2 * KV) * D;
    float q[GROUP][8], new_k[8], new_v[8];
    UNROLL for (int g = 0; g < GROUP; g++) {
        rotated(q[g], qkv + (head * GROUP + g) * D, m, c, s);
        UNROLL for (int i = 0; i < 8; i++) q[g][i] *= SCALE;
    }
    rotated(new_k, qkv + (HEADS + head) * D, m, c, s);
    unpack(fresh(qkv + (HEADS + KV + head) * D + m * 8), new_v);
    Softmax state(q, new_k, new_v, team == 0);
    while (true)
        UNROLL for (int b = 0; b < DEPTH; b++) {
            attend(state, q, k[b], v[b], first, place);
            first += STEP;
            if (first - team >= place) goto attended;
            load_places(k[b], keys, first + (DEPTH - 1) * STEP, place);
            load_places(v[b], values, first + (DEPTH - 1) * STEP, place);
        }
attended:
    publish(state, shared);
    SPLIT > 1 ? cluster_sync() : __syncthreads();
    float result[EACH];
    UNROLL for (int e = 0; e < EACH; e++) {
        int n = (e * SPLIT + rank) * THREADS + threadIdx.x;
        result[e] = joined(shared, n / D % GROUP, n % D);
    }
    if (SPLIT > 1) cluster_sync();  // no CTA ends while others read its part. Before the stores: it would wait for them
    UNROLL for (int e = 0; e < EACH; e++) {
        int n = (e * SPLIT + rank) * THREADS + threadIdx.x;
        if (n < GROUP * D) a.y[row * HEADS * D + head * GROUP * D + n].bits = narrow(result[e]);
    }
    if (team == 0) {
        *(uint4*)(keys + place * D) = pack(new_k);
        *(uint4*)(values + place * D) = pack(new_v);
    }
}
#endif


#ifdef RING
// For many rows: GRID CTAs walk over the pairs of a row and a key head. One more warp has keys and values copied into a
// ring of STAGES tiles of PLACES places, those of the next pairs too, so memory does not idle at the end of a pair.
// Pairs by length are dealt out forth and back. So all CTAs read about as much.

constexpr int ROUNDS = (UNITS + GRID - 1) / GRID;
static_assert(PASS * TEAMS == PLACES && SPLIT == 1, "a tile is what all teams load at once");

struct Shared {
    u64 full[STAGES], free[STAGES];
    long long place[ROUNDS];
    int unit[ROUNDS];
    Parts parts[2];
    alignas(128) uint4 k[STAGES][PLACES][MEMBERS], v[STAGES][PLACES][MEMBERS];
};
extern "C" __device__ const int needed_bytes = sizeof(Shared);

DEVICE void deal(Shared& shared, const long long* position) {  // a warp a round
    for (int i = threadIdx.x / 32; i < ROUNDS; i += WARPS + 1) {
        int dealt = BY_LENGTH && i % 2 ? (i + 1) * GRID - 1 - blockIdx.x : i * GRID + blockIdx.x;
        Row next = dealt < UNITS ? row_at(dealt / KV, position) : Row{ROWS, 0};
        if (threadIdx.x % 32 == 0) shared.unit[i] = next.row * KV + dealt % KV, shared.place[i] = next.place;
    }
}

DEVICE void produce(Shared& shared, const Arguments& a) {
    int turn = 0;
    for (int i = 0; i < ROUNDS; i++) {
        long long unit = shared.unit[i], place = shared.place[i];
        const bf16 *k = a.k + unit * a.length * D, *v = a.v + unit * a.length * D;
        for (long long l = 0; l < place; l += PLACES, turn++) {
            int stage = turn % STAGES, bytes = (place - l < PLACES ? (int)(place - l) : PLACES) * D * 2;
            if (turn >= STAGES) barrier_wait(&shared.free[stage], turn / STAGES - 1 & 1);
            barrier_expect(&shared.full[stage], 2 * bytes);
            copy_async(shared.k[stage], k + l * D, bytes, &shared.full[stage]);
            copy_async(shared.v[stage], v + l * D, bytes, &shared.full[stage]);
        }
    }
}

struct Inputs {  // a thread's pieces of the new vectors, not turned yet: own, and those that they are turned with
    uint4 q[GROUP][2], k[2], v;
    float c[8], s[8];

    DEVICE void load(const Arguments& a, int unit, long long place, int m) {
        int row = unit / KV, head = unit % KV, other = m ^ MEMBERS / 2;
        const bf16* qkv = a.qkv + row * (HEADS + 2 * KV) * D;
        UNROLL for (int g = 0; g < GROUP; g++)
            UNROLL for (int i = 0; i < 2; i++) q[g][i] = fresh(qkv + (head * GROUP + g) * D + (i ? other : m) * 8);
        UNROLL for (int i = 0; i < 2; i++) k[i] = fresh(qkv + (HEADS + head) * D + (i ? other : m) * 8);
        v = fresh(qkv + (HEADS + KV + head) * D + m * 8);
        if (ROPE)
            UNROLL for (int i = 0; i < 8; i++) c[i] = a.cos[place * D + m * 8 + i], s[i] = a.sin[place * D + m * 8 + i];
    }
    DEVICE void turned(float (&out)[8], const uint4 (&piece)[2]) const {
        float other[8];
        unpack(piece[0], out);
        unpack(piece[1], other);
        if (ROPE) UNROLL for (int i = 0; i < 8; i++) out[i] = rounded(out[i] * c[i] + other[i] * s[i]);
    }
};

DEVICE void walk(Softmax& state, Shared& shared, const float (&q)[GROUP][8], long long place, int& turn) {
    int m = threadIdx.x % MEMBERS, team = threadIdx.x / MEMBERS;
    for (long long l = 0; l < place; l += PLACES, turn++) {
        int stage = turn % STAGES;
        uint4 k[PASS], v[PASS];
        barrier_wait(&shared.full[stage], turn / STAGES & 1);
        UNROLL for (int p = 0; p < PASS; p++) {
            k[p] = shared.k[stage][team + p * TEAMS][m];
            v[p] = l + team + p * TEAMS < place ? shared.v[stage][team + p * TEAMS][m] : uint4{0, 0, 0, 0};
        }
        unsigned read = 0;
        UNROLL for (int p = 0; p < PASS; p++) read ^= k[p].x ^ v[p].x;
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive_after(read, &shared.free[stage]);
        attend(state, q, k, v, l + team, place);
    }
}

DEVICE void store_result(const Parts& parts, const Arguments& a, int unit) {
    for (int n = threadIdx.x; n < GROUP * D; n += THREADS)
        a.y[(long long)unit * GROUP * D + n].bits = narrow(joined(parts, n / D, n % D));
}

DEVICE void compute(Shared& shared, const Arguments& a) {
    int m = threadIdx.x % MEMBERS, team = threadIdx.x / MEMBERS, turn = 0;
    Inputs next;
    next.load(a, shared.unit[0], shared.place[0], m);
    for (int i = 0; i < ROUNDS && shared.unit[i] < UNITS; i++) {
        int unit = shared.unit[i];
        long long place = shared.place[i];
        float q[GROUP][8], new_k[8], new_v[8];
        UNROLL for (int g = 0; g < GROUP; g++) {
            next.turned(q[g], next.q[g]);
            UNROLL for (int j = 0; j < 8; j++) q[g][j] *= SCALE;
        }
        next.turned(new_k, next.k);
        unpack(next.v, new_v);
        Softmax state(q, new_k, new_v, team == 0);
        if (team == 0) {
            long long to = ((long long)unit * a.length + place) * D + m * 8;
            *(uint4*)(a.k + to) = pack(new_k);
            *(uint4*)(a.v + to) = next.v;
        }
        if (i + 1 < ROUNDS && shared.unit[i + 1] < UNITS) next.load(a, shared.unit[i + 1], shared.place[i + 1], m);
        walk(state, shared, q, place, turn);
        publish(state, shared.parts[i % 2]);
        sync_threads<THREADS>();
        store_result(shared.parts[i % 2], a, unit);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS + 32) attention(Arguments a) {
    Shared& shared = *(Shared*)shared_memory();
    start_next();
    deal(shared, a.position);
    if (threadIdx.x == THREADS)
        for (int i = 0; i < STAGES; i++) barrier_init(&shared.full[i], 1), barrier_init(&shared.free[i], WARPS);
    __syncthreads();
    if (threadIdx.x == THREADS) produce(shared, a);
    if (threadIdx.x >= THREADS) return;
    wait_for_input();
    compute(shared, a);
}
#endif
#endif
