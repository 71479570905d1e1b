// The kernels of a decoding step of 5 to 64 sequences: `embed`, `linear` on tensor cores, `attention`.
//
// A step is a chain of these. With programmatic dependent launch a kernel starts while its predecessors still run. It
// requests its weights, and attention the keys and values of earlier steps, before it waits for its input. So memory
// does not idle between kernels.
//
// `linear` is y = act(norm(x) W^T + bias) + residual for TOKENS tokens, a multiple of 8. The weights of a thread block
// (CTA) fit into its shared memory at once, so there is no ring: one copy a row, one barrier for 16 rows. A cluster of
// SPLIT CTAs shares the columns of 16 TILES rows, and in each CTA KW warps do. mma's 16 rows are weights, its 8 columns
// tokens. The columns of its operands may come in any order as long as both agree, so a thread loads 16 bytes of each
// row and these are what it needs for two mmas. A warp keeps its columns of x in registers. Partial sums replace the
// weights that they were made of. All sums have one order: a step repeats itself bit for bit.
//
// The host defines one kernel, LINEAR, ATTENTION or EMBED, and its constants.

struct bf16 { unsigned short bits; };
typedef unsigned long long u64;
#define UNROLL _Pragma("unroll")
enum Activation { NONE, GELU, RELU2, SWIGLU };
enum Norm { NO_NORM, LAYER_NORM, RMS_NORM };


// ---------------------------------------------------------------------------------------------------------------------
// What the hardware does, as PTX; on a CPU tests/emulate.h does it

#ifndef EMULATED
#define DEVICE __device__ __forceinline__

DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void barrier_expect(u64* barrier, int bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u64* barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\nbra AGAIN;\nDONE:\n}" :: "r"(shared_address(barrier)), "r"(phase) : "memory");
}
DEVICE void copy_async(void* to, const void* from, int bytes, u64* barrier) {  // evict_first: L2 is for activations
    asm volatile("{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], once;\n}"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
DEVICE void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE float shuffle(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE float of_cluster(const float* p, int rank) {  // *p in the shared memory of another CTA of the cluster
    float value;
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(value) : "r"(shared_address(p)), "r"(rank) : "memory");
    return value;
}
DEVICE void start_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
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

template <int n> DEVICE float sum_over(float value) {  // n neighbouring threads
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
// A CTA a token: x = wte[token] + wpe[position], and its moments. BATCH, WIDTH, THREADS, WPE.

struct Arguments {
    const long long *token, *position;
    const bf16 *wte, *wpe;
    bf16* x;
    Moments* moments;
};

extern "C" __global__ void __launch_bounds__(THREADS) embed(Arguments a) {
    wait_for_input();
    start_next();  // after the wait: so all that ran before this step is over when the next kernels start
    int t = blockIdx.x;
    const bf16* word = a.wte + (t < BATCH ? a.token[t] : 0) * WIDTH;
    const bf16* place = WPE ? a.wpe + (t < BATCH ? a.position[t] : 0) * WIDTH : word;
    for (int start = 0; start < WIDTH; start += THREADS) {
        int i = start + threadIdx.x;
        float value = i < WIDTH && t < BATCH ? wide(word[i].bits) + (WPE ? wide(place[i].bits) : 0) : 0;
        value = rounded(value);
        Moments m = moments_of(value);
        if (i < WIDTH) a.x[t * WIDTH + i].bits = narrow(value);
        if (i < WIDTH && i % 16 == 0) a.moments[(t * WIDTH + i) / 16] = m;
    }
}
#endif


#ifdef LINEAR
// ---------------------------------------------------------------------------------------------------------------------
// A linear. TOKENS, ROWS and K of each of BLOCKS blocks, SPREAD, TILES, SPLIT, KW, RW, NORM, ACT, BIAS, RESIDUAL,
// MOMENTS (whether it writes them). Block b maps columns b K to (b + 1) K of x. Row j's output goes to place
// j % SPREAD * (all rows / SPREAD) + j / SPREAD.

constexpr int WARPS = KW * RW, THREADS = 32 * WARPS, NT = TOKENS / 8;
constexpr int ALL = ROWS * BLOCKS, IN = K * BLOCKS, OUT = ACT == SWIGLU ? ALL / 2 : ALL;
constexpr int COLUMNS = K / SPLIT, SLICE = COLUMNS / KW, CHUNKS = SLICE / 32;  // of a CTA; of a warp; 32 columns
constexpr int PITCH = 2 * COLUMNS + (COLUMNS % 64 ? 0 : 64);  // bytes: 8 rows' pieces lie in different banks
constexpr int CLUSTERS = ROWS / (16 * TILES);                 // of a block
constexpr int COUNT = TILES * TOKENS / SPLIT;                 // pairs of tile and token that a CTA finishes
constexpr int EACH = (COUNT + THREADS / 16 - 1) / (THREADS / 16);
constexpr int PARTS = IN / 16;                                // whose moments the norm joins
static_assert(K % (32 * SPLIT * KW) == 0 && ROWS % (16 * TILES) == 0 && TILES * TOKENS % SPLIT == 0, "tiles divide");
static_assert(SLICE >= 2 * TOKENS, "partial sums replace weights");

struct Arguments {
    const bf16 *x, *w, *bias, *gain, *shift, *residual;
    const Moments* moments;
    bf16* y;
    Moments* new_moments;
    float eps;
};

struct Shared {
    u64 full[TILES];
    float bias[16 * TILES];
    float mean[TOKENS], scale[TOKENS];
    alignas(16) bf16 gain[NORM ? COLUMNS : 8], shift[NORM ? COLUMNS : 8];
    alignas(128) char weights[16 * TILES * PITCH];
};
extern "C" __device__ const int needed_bytes = sizeof(Shared);

struct Work {  // of a CTA
    int rank, block, first;
    DEVICE Work() {
        rank = SPLIT > 1 ? cluster_rank() : 0;
        int cluster = blockIdx.x / SPLIT;
        block = cluster / CLUSTERS, first = cluster % CLUSTERS * TILES;
    }
    DEVICE int row(int tile, int i) const {  // of all; swiglu: 8 rows of gates, the 8 values that they belong to
        tile += first;
        return block * ROWS + (ACT == SWIGLU ? tile * 8 + i % 8 + i / 8 * (ROWS / 2) : tile * 16 + i);
    }
    DEVICE int place(int row) const { return row % SPREAD * (ALL / SPREAD) + row / SPREAD; }
};

DEVICE void request_weights(Shared& shared, const Work& work, const bf16* w) {  // one warp
    if (threadIdx.x == 0)
        for (int tile = 0; tile < TILES; tile++) {
            barrier_init(shared.full + tile, 1);
            barrier_expect(shared.full + tile, 16 * 2 * COLUMNS);
        }
    __syncwarp();
    for (int i = threadIdx.x; i < 16 * TILES; i += 32)
        copy_async(shared.weights + i * PITCH, w + (long long)work.row(i / 16, i % 16) * K + work.rank * COLUMNS,
                   2 * COLUMNS, shared.full + i / 16);
}

DEVICE void load_vectors(Shared& shared, const Work& work, const Arguments& a) {
    for (int i = threadIdx.x; i < 16 * TILES; i += THREADS)
        shared.bias[i] = BIAS ? wide(a.bias[work.place(work.row(i / 16, i % 16))].bits) : 0;
    if (NORM)
        for (int i = 8 * threadIdx.x; i < COLUMNS; i += 8 * THREADS) {
            int column = work.block * K + work.rank * COLUMNS + i;
            *(uint4*)(shared.gain + i) = piece(a.gain + column);
            *(uint4*)(shared.shift + i) = a.shift ? piece(a.shift + column) : uint4{0, 0, 0, 0};
        }
}

DEVICE void join_moments(Shared& shared, const Arguments& a) {  // a warp a token
    int lane = threadIdx.x % 32;
    for (int t = threadIdx.x / 32; t < TOKENS; t += WARPS) {
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

DEVICE void normalise(uint4 (&x)[CHUNKS][NT], const Shared& shared, int column, int token) {
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        float gain[8], shift[8], v[8];
        unpack(piece(shared.gain + column + c * 32), gain);
        unpack(piece(shared.shift + column + c * 32), shift);
        UNROLL for (int n = 0; n < NT; n++) {
            float mean = shared.mean[n * 8 + token], scale = shared.scale[n * 8 + token];
            unpack(x[c][n], v);
            UNROLL for (int i = 0; i < 8; i++) v[i] = (v[i] - mean) * scale * gain[i] + shift[i];
            x[c][n] = pack(v);
        }
    }
}

// Where the partial sum of a row of a tile and a token stands, for a warp's slice; turned by the row, so that threads
// that read neighbouring rows use different banks.
DEVICE float* partial(Shared& shared, int tile, int i, int slice, int token) {
    return (float*)(shared.weights + (tile * 16 + i) * PITCH + slice * 2 * SLICE) + (token + i / 2 * 2) % TOKENS;
}

DEVICE void multiply(Shared& shared, const uint4 (&x)[CHUNKS][NT], int tile, int slice) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const char* rows = shared.weights + (tile * 16 + g) * PITCH + slice * 2 * SLICE + t * 16;
    float sums[NT][4] = {};
    UNROLL for (int c = 0; c < CHUNKS; c++) {
        uint4 upper = *(const uint4*)(rows + c * 64), lower = *(const uint4*)(rows + 8 * PITCH + c * 64);
        UNROLL for (int n = 0; n < NT; n++) {
            mma(sums[n], upper.x, lower.x, upper.y, lower.y, x[c][n].x, x[c][n].y);
            mma(sums[n], upper.z, lower.z, upper.w, lower.w, x[c][n].z, x[c][n].w);
        }
    }
    __syncwarp();
    UNROLL for (int n = 0; n < NT; n++) {
        *(float2*)partial(shared, tile, g, slice, n * 8 + 2 * t) = float2{sums[n][0], sums[n][1]};
        *(float2*)partial(shared, tile, g + 8, slice, n * 8 + 2 * t) = float2{sums[n][2], sums[n][3]};
    }
}

DEVICE float activate(float a) {
    if (ACT == RELU2) return a > 0 ? a * a : 0;
    if (ACT == GELU) return a / (1 + __expf(-1.5957691216f * (a + 0.044715f * a * a * a)));  // tanh form
    return a;
}

DEVICE float sum_of_slices(Shared& shared, int tile, int i, int token) {
    float sum = 0;
    UNROLL for (int s = 0; s < KW; s++) sum += *partial(shared, tile, i, s, token);
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) linear(Arguments a) {
    Shared& shared = *(Shared*)shared_memory();
    Work work;
    int warp = threadIdx.x / 32, slice = warp % KW, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    start_next();
    if (warp == 0) request_weights(shared, work, a.w);
    load_vectors(shared, work, a);
    wait_for_input();

    int column = slice * SLICE + t * 8, half = threadIdx.x / 16, i = threadIdx.x % 16;
    uint4 x[CHUNKS][NT];
    UNROLL for (int c = 0; c < CHUNKS; c++)
        UNROLL for (int n = 0; n < NT; n++)
            x[c][n] = fresh(a.x + (n * 8 + g) * IN + work.block * K + work.rank * COLUMNS + column + c * 32);
    float residual[EACH];
    UNROLL for (int e = 0; e < EACH; e++) {
        int item = (half + e * (THREADS / 16)) * SPLIT + work.rank;
        if (RESIDUAL && item < TILES * TOKENS)
            residual[e] = fresh_value(a.residual + item % TOKENS * OUT + work.place(work.row(item / TOKENS, i)));
    }
    if (NORM) join_moments(shared, a);
    __syncthreads();  // also: the barriers are there
    if (NORM) normalise(x, shared, column, g);

    UNROLL for (int tile = warp / KW; tile < TILES; tile += RW) {
        barrier_wait(shared.full + tile, 0);
        multiply(shared, x, tile, slice);
    }
    __syncthreads();
    if (SPLIT > 1) {  // the sums of a CTA's columns, where other CTAs find them
        for (int item = half; item < TILES * TOKENS; item += THREADS / 16) {
            int tile = item / TOKENS, token = item % TOKENS;
            *partial(shared, tile, i, 0, token) = sum_of_slices(shared, tile, i, token);
        }
        cluster_sync();
    }
    UNROLL for (int e = 0; e < EACH; e++) {  // threads without a pair follow, since shuffles need all
        int number = half + e * (THREADS / 16), item = (number < COUNT ? number : COUNT - 1) * SPLIT + work.rank;
        int tile = item / TOKENS, token = item % TOKENS, row = work.row(tile, i), place = work.place(row);
        float sum = 0;
        if (SPLIT > 1)
            UNROLL for (int r = 0; r < SPLIT; r++) sum += of_cluster(partial(shared, tile, i, 0, token), r);
        else
            sum = sum_of_slices(shared, tile, i, token);
        float value = activate(sum + shared.bias[tile * 16 + i]);
        if (ACT == SWIGLU) value = value / (1 + __expf(-value)) * shuffle(value, 8);
        if (RESIDUAL) value += residual[e];
        if (number < COUNT && (ACT != SWIGLU || i < 8)) a.y[token * OUT + place].bits = narrow(value);
        if (MOMENTS) {
            Moments m = moments_of(rounded(value));
            if (number < COUNT && i == 0) a.new_moments[token * (OUT / 16) + row / 16] = m;
        }
    }
    if (SPLIT > 1) cluster_sync();  // no CTA ends while others read its sums
}
#endif


#ifdef ATTENTION
// ---------------------------------------------------------------------------------------------------------------------
// Attention of one new token a row. A cluster of SPLIT CTAs for each row and key head, with its GROUP query heads. BATCH,
// HEADS, KV, D, LENGTH (of the cache), WARPS, PASS, SPLIT, ROPE. D / 8 threads, a team, share a place; a team loads PASS
// places at once.

constexpr int THREADS = 32 * WARPS, GROUP = HEADS / KV, MEMBERS = D / 8, TEAMS = THREADS / MEMBERS;
constexpr float LEAST = -1e30f;  // a score of nothing

struct Arguments {
    const bf16* qkv;
    const float *cos, *sin;
    const long long* position;
    bf16 *k, *v, *y;
};

struct Shared {
    float out[WARPS][GROUP][D], top[WARPS][GROUP], total[WARPS][GROUP];
};
extern "C" __device__ const int needed_bytes = sizeof(Shared);

struct Softmax {  // a running one, over the places of a team
    float top[GROUP], total[GROUP], out[GROUP][8];

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

DEVICE float dot(const float (&a)[8], const float (&b)[8]) {
    float sum = 0;
    UNROLL for (int i = 0; i < 8; i++) sum += a[i] * b[i];
    return sum_over<MEMBERS>(sum);
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

extern "C" __global__ void __launch_bounds__(THREADS) attention(Arguments a) {
    Shared& shared = *(Shared*)shared_memory();
    int rank = SPLIT > 1 ? cluster_rank() : 0, head = blockIdx.x / SPLIT % KV, row = blockIdx.x / SPLIT / KV;
    int warp = threadIdx.x / 32, m = threadIdx.x % MEMBERS, team = rank * TEAMS + threadIdx.x / MEMBERS;
    start_next();
    // Before the wait: places that earlier steps wrote, and the position, which the step before this one set
    long long place = a.position[row], first = team;
    bf16 *keys = a.k + (long long)(row * KV + head) * LENGTH * D + m * 8, *values = a.v + (keys - a.k);
    uint4 k[PASS], v[PASS];
    load_places(k, keys, first, place);
    load_places(v, values, first, place);
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
    Softmax state;  // team 0 begins with the new token
    UNROLL for (int g = 0; g < GROUP; g++) {
        float score = dot(q[g], new_k);
        state.top[g] = team == 0 ? score : LEAST, state.total[g] = team == 0;
        UNROLL for (int i = 0; i < 8; i++) state.out[g][i] = team == 0 ? new_v[i] : 0;
    }
    while (true) {
        attend(state, q, k, v, first, place);
        first += PASS * TEAMS * SPLIT;
        if (first - team >= place) break;
        load_places(k, keys, first, place);
        load_places(v, values, first, place);
    }
    if (team == 0) {
        *(uint4*)(keys + place * D) = pack(new_k);
        *(uint4*)(values + place * D) = pack(new_v);
    }

    UNROLL for (int g = 0; g < GROUP; g++) {
        UNROLL for (int o = MEMBERS; o < 32; o *= 2) {  // the teams of a warp
            float other[8];
            UNROLL for (int i = 0; i < 8; i++) other[i] = shuffle(state.out[g][i], o);
            float top = shuffle(state.top[g], o), total = shuffle(state.total[g], o);
            state.add(top, total, other, g);
        }
        if (threadIdx.x % 32 < MEMBERS) {
            UNROLL for (int i = 0; i < 8; i++) shared.out[warp][g][m * 8 + i] = state.out[g][i];
            shared.top[warp][g] = state.top[g], shared.total[warp][g] = state.total[g];
        }
    }
    SPLIT > 1 ? cluster_sync() : __syncthreads();
    for (int n = rank * THREADS + threadIdx.x; n < GROUP * D; n += SPLIT * THREADS) {
        int g = n / D, d = n % D;
        float top = LEAST, total = 0, out = 0;
        UNROLL for (int r = 0; r < SPLIT; r++)
            UNROLL for (int w = 0; w < WARPS; w++) {
                auto there = [&](const float* p) { return SPLIT > 1 ? of_cluster(p, r) : *p; };
                float new_top = there(&shared.top[w][g]), most = top > new_top ? top : new_top;
                float mine = __expf(top - most), theirs = __expf(new_top - most);
                total = total * mine + there(&shared.total[w][g]) * theirs;
                out = out * mine + there(&shared.out[w][g][d]) * theirs, top = most;
            }
        a.y[row * HEADS * D + head * GROUP * D + n].bits = narrow(out / total);
    }
    if (SPLIT > 1) cluster_sync();  // no CTA ends while others read its part
}
#endif
