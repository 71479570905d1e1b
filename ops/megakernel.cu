// A decoding step of a few sequences as one persistent kernel, from the embedding to the logits.
//
// At such batches a step reads every weight once and computes little: memory must never idle. Each multiprocessor runs
// one thread block (CTA): a producer warp and WARPS consumer warps. Every matrix is cut into shares of rows, one for
// each CTA. The CTAs share the columns too where a matrix has few long rows. A share is one piece of memory.
//
// One layer in one CTA, time to the right. All CTAs do the same with shares of their own, joined by published floats.
//
//   producer   qkv W | KV cache    | proj W     | V1    | U1     | V2    | U2     | qkv W (next layer)
//      |       copies shares into a ring of slots in shared memory, ahead of the consumers by what the ring holds
//      v
//   consumers        | qkv         | attention  | proj  | fc1: V1 | U1    | fc2: V2 | U2      | qkv (next)
//     read           | x           | qkv        | part  | y       | rank1 | hidden  | rank2   | x
//     publish        | qkv         | part, lse  | y     | rank1   | hidden| rank2   | x       | qkv
//     also add       |             |            | x     |         |       |         | y       |
//     store          |             | k, v       |       |         |       |         |         |
//
// What a stage computes is published in global memory, which L2 holds, as tagged floats. The last two bits of a tagged
// float are its epoch: the parities of launch and layer. A reader polls until the epoch is that of now. Until then it
// sees the epoch of the layer before, or of the launch before. So nothing waits for stores to arrive, as a grid barrier
// would. A counter of stages done only says when polling is worth while: more of it would slow down those that publish.
//
// No tagged float is overwritten before all have read it. Its next writer owns rows of qkv. So it has waited, through
// the stages in between, for all of qkv's input, which means that all CTAs have finished the layer before.
//
// The host defines: BATCH (sequences), Weight (bf16 or float), GRID (CTAs), WARPS, SLOT (bytes), N, HEADS, KV, D,
// LAYERS, STAGES, SPLITS, COPIES, ROPE, RMS, ACT, QKV, PROJ, HEAD (matrices), LAYERS_OF (`layers` of equal layers).

struct bf16 { unsigned short bits; };
enum Activation { GELU, RELU2, SWIGLU };
enum Input { PLAIN, NORMED, PARTS, GATED };
#define ROLL _Pragma("unroll 1")         // a loop that is not to be unrolled: its code is loaded again in every layer
typedef unsigned Tagged;                 // a float of an activation whose last two bits are its epoch

constexpr int THREADS = 32 * WARPS;      // of the consumer warps
constexpr int E = 16 / sizeof(Weight);   // weights in a piece: the 16 bytes that a thread loads at a time
constexpr int MAX_SLOTS = 32;            // at most. More: barriers take room; fewer: shared memory stays unused
// Slots filled or in flight up to which two copies may be in flight; beyond it, one. Higher, copies queue before the
// memory and activations queue after them; lower, memory idles.
constexpr int PREFETCH_DEPTH = BATCH == 1 ? 8 : 6;
// Slots of a mean share above which one more copy is in flight. Higher: long shares are slower; lower: short ones wait.
constexpr int LONG_SHARE = 6;
// CTAs that may still work on a stage when others start to poll. Higher, polling disturbs them; lower, it starts late.
constexpr int EARLY = 12;
// Cache positions that a CTA attends to at most while CTAs last. Higher, few CTAs do all; lower, more parts to merge.
constexpr int REACH = BATCH == 1 ? 128 : 96 * BATCH;


// ---------------------------------------------------------------------------------------------------------------------
// What the hardware does, as PTX; on a CPU tests/emulate.h does it

#ifndef EMULATED
DEVICE bool barrier_done(u64* barrier, int phase) {
    int done;
    asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
                 "selp.s32 %0, 1, 0, done;\n}" : "=r"(done) : "r"(shared_address(barrier)), "r"(phase) : "memory");
    return done;
}
DEVICE void copy_async(void* to, const void* from, int bytes, u64* barrier) {  // evict_first: L2 is for activations
    asm volatile("{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], once;\n}"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
DEVICE void sync_consumers() { asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory"); }
DEVICE void add_release(u64* counter) {
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" :: "l"(counter) : "memory");
}
DEVICE u64 load_acquire(const u64* counter) {
    u64 value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
    return value;
}
DEVICE void add_relaxed(unsigned* counter) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" :: "l"(counter)); }
DEVICE unsigned load_hint(const unsigned* counter) {
    unsigned value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter));
    return value;
}
DEVICE void store_relaxed(Tagged* to, Tagged value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(value));
}
DEVICE Tagged load_relaxed(const Tagged* from) {
    Tagged value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}
DEVICE void load_relaxed(Tagged (&values)[4], const Tagged* from) {  // 16 aligned bytes
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3]) : "l"(from));
}
DEVICE void pause() {}  // where the threads of the emulator take turns
#if __CUDA_ARCH__ == 900  // other cards may start a warp with fewer than 168 registers, too few to hand over
DEVICE void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 232;"); }  // four warps at a time
DEVICE void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 40;"); }
#else
DEVICE void more_registers() {}
DEVICE void fewer_registers() {}
#endif
DEVICE unsigned shared_bytes() {
    unsigned bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
}
DEVICE float shuffle(float value, int mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}
#endif


// ---------------------------------------------------------------------------------------------------------------------
// Numbers

DEVICE void unpack(const uint4& piece, float (&out)[E]) {
    const unsigned bits[4] = {piece.x, piece.y, piece.z, piece.w};
    UNROLL for (int i = 0; i < 4; i++)
        if constexpr (E == 8) {  // a bf16 is the upper half of a float
            out[2 * i] = __uint_as_float(bits[i] << 16);
            out[2 * i + 1] = __uint_as_float(bits[i] & 0xffff0000);
        } else
            out[i] = __uint_as_float(bits[i]);
}

DEVICE float wide(bf16 a) { return __uint_as_float((unsigned)a.bits << 16); }
DEVICE float wide(float a) { return a; }
DEVICE void narrow(float a, float& out) { out = a; }
DEVICE void narrow(float a, bf16& out) {  // to nearest, ties to even
    unsigned bits = __float_as_uint(a);
    out.bits = a == a ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

DEVICE void load(float (&out)[E], const float* from) {
    UNROLL for (int i = 0; i < E; i += 4) {
        float4 four = *(const float4*)(from + i);
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
}

// A row of tagged floats lies in memory in the order of a warp's loads, 16 bytes a lane: the first halves of 32 pieces,
// then the second halves.
constexpr int SPAN = 32 * E;
DEVICE constexpr int row_of(int n) { return (n + SPAN - 1) / SPAN * SPAN; }  // tagged floats of a row with n entries
DEVICE int place_of(int n) { return n / SPAN * SPAN + n % E / 4 * 128 + n % SPAN / E * 4 + n % 4; }

DEVICE Tagged tagged(float value, unsigned epoch) {  // rounded to what the last two bits leave
    return (value == value ? __float_as_uint(value) + 2 & ~3u : 0x7fc00000) | epoch;
}
DEVICE float value_of(Tagged t) { return __uint_as_float(t & ~3u); }
DEVICE unsigned epoch_of(Tagged t) { return t & 3; }

DEVICE float dot(const float (&a)[E], const float (&b)[E]) {
    float sum = 0;
    UNROLL for (int i = 0; i < E; i++) sum += a[i] * b[i];
    return sum;
}

DEVICE float activate(float a) {
    if (ACT == RELU2) return a > 0 ? a * a : 0;
    if (ACT == GELU) return a / (1 + __expf(-1.5957691216f * (a + 0.044715f * a * a * a)));  // tanh form
    return a;  // SWIGLU: the next stage does it as it reads
}

template <int n> DEVICE float sum_over(float value) {  // n neighbouring threads
    UNROLL for (int o = n / 2; o; o /= 2) value += shuffle(value, o);
    return value;
}

// n sums over a warp; lane l gets that of values[l * n / 32]
template <int n, int o = 16> DEVICE float sums_over_warp(float* values) {
    if constexpr (n == 1)
        return sum_over<2 * o>(values[0]);
    else {
        UNROLL for (int i = 0; i < n / 2; i++) {
            bool upper = threadIdx.x & o;
            float give = upper ? values[i] : values[i + n / 2], keep = upper ? values[i + n / 2] : values[i];
            values[i] = keep + shuffle(give, o);
        }
        return sums_over_warp<n / 2, o / 2>(values);
    }
}


// ---------------------------------------------------------------------------------------------------------------------
// Who does what

DEVICE constexpr int least(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int most(int a, int b) { return a > b ? a : b; }
DEVICE constexpr int power_of_two(int n) { return n <= 1 ? 1 : 2 * power_of_two((n + 1) / 2); }

// Rows whose sums a warp reduces together. Higher, the code grows, and every layer loads it again; lower, shuffles
// repeat.
constexpr int SUMS = BATCH == 1 ? 32 : 4;

// BLOCKS blocks of ROWS x COLS, one below the other; block b maps entries b COLS to (b + 1) COLS. Row j's output goes
// to place j % SPREAD * (all rows / SPREAD) + j / SPREAD. A CTA has neighbouring rows of one block, and its threads
// share their columns. SUMMED: the blocks lie side by side, and who reads the outputs adds them.
template <int ROWS, int COLS, int BLOCKS = 1, int SPREAD = ROWS * BLOCKS, bool SUMMED = false>
struct Matrix {
    static constexpr int addends = SUMMED ? BLOCKS : 1;
    static constexpr int all = ROWS * BLOCKS, K = COLS, blocks = BLOCKS, bytes = COLS * sizeof(Weight);
    static constexpr int pieces = K / E;                                        // of a row
    static constexpr int group = least((pieces + 31) / 32 * 32, THREADS);       // threads that share a row, whole warps
    static constexpr int groups = THREADS / group;
    static constexpr int each = (pieces + group - 1) / group;                   // pieces of a row for each thread
    static constexpr bool even = THREADS % group == 0 && pieces % group == 0;   // all threads have equally many pieces
    static constexpr int rows = most(1, least(SLOT / bytes / groups, SUMS));    // of a slot for each group
    static constexpr int slot = rows * groups;                                  // rows in a slot
    static constexpr int share = (ROWS + GRID / BLOCKS - 1) / (GRID / BLOCKS);  // rows of a CTA at most
    static constexpr int share_bytes = share * bytes;
    // slots whose sums are reduced together, and rows between two readings of `partial`
    static constexpr int several = most(1, least(least(SUMS, 8) / rows, (share + slot - 1) / slot));
    static constexpr int round = THREADS / BATCH / (slot * several) * slot * several;
    static_assert(slot * bytes <= SLOT && round > 0 && COLS % E == 0 && BLOCKS <= GRID, "the host plans for this");

    int block, first, count;                                                    // of this CTA; first: of all rows
    DEVICE Matrix() {
        constexpr int ctas = GRID / BLOCKS;                                     // of a block
        int i = blockIdx.x % ctas, begin = ROWS * i / ctas;
        bool idle = blockIdx.x >= ctas * BLOCKS;
        block = idle ? 0 : blockIdx.x / ctas;
        first = block * ROWS + begin;
        count = idle ? 0 : ROWS * (i + 1) / ctas - begin;
    }
    DEVICE static bool in_group() { return THREADS % group == 0 || threadIdx.x < groups * group; }
    DEVICE static bool has(int piece) {                                         // this thread
        return in_group() && (pieces % group == 0 || piece * group + threadIdx.x % group < pieces);
    }
    DEVICE long long start(int row) const {                                     // its first byte
        long long i = SUMMED ? (long long)(first + row - block * ROWS) * BLOCKS + block : (long long)(first + row);
        return i * bytes;
    }
    DEVICE int place(int row) const { return (first + row) % SPREAD * (all / SPREAD) + (first + row) / SPREAD; }
};

template <class A> struct Dense {
    typedef A First, Last;
    static constexpr int factors = 1, share_bytes = A::share_bytes;
};
template <class A, class B> struct Factors {
    typedef A First;
    typedef B Last;
    static constexpr int factors = 2, share_bytes = A::share_bytes + B::share_bytes;
};

template <class M> using Pieces = float[BATCH * M::each][E];  // a thread's, of every sequence's row

constexpr int MEMBERS = D / E;                       // threads that share a position of the cache, a team
constexpr int TEAMS = THREADS / MEMBERS;
constexpr int POSITIONS = SLOT / 2 / (16 * MEMBERS); // in a slot: keys in its first half, values in its second
constexpr int WARP_GROUPS = least(4, WARPS);         // take slots in turn. More: fewer scores each; fewer: slots wait
static_assert(POSITIONS % TEAMS == 0 && 32 % MEMBERS == 0, "the host plans for this");

// A part of attention: a query head of a sequence and some positions of its cache, `first` to `stop` of `length`.
constexpr int ITEMS = SPLITS * BATCH * HEADS;
DEVICE int splits_of(int length) { return most(1, least(SPLITS, (length + REACH - 1) / REACH)); }
struct Item {
    int head, kv, b, length, first, stop;
    DEVICE Item(int item, const int* lengths) {
        head = item % HEADS, kv = head / (HEADS / KV), b = item / HEADS % BATCH, length = lengths[b];
        int splits = splits_of(length), reach = most(1, (length + splits - 1) / splits);
        first = item / (HEADS * BATCH) * reach, stop = least(first + reach, length);
    }
    DEVICE long long cache() const { return b * KV + kv; }  // row of the cache
};

struct Shared {
    u64 full[MAX_SLOTS], empty[MAX_SLOTS];               // barriers of the ring
    u64 table[LAYERS][9];
    alignas(16) float partial[2][THREADS * WARPS];       // sums of rows by warp; the rounds use the two in turn
    float moments[WARPS][2 * power_of_two(BATCH)];       // of each warp's part of the rows: sum, sum of squares
    float heads[WARPS][D], largest[WARPS], sums[WARPS];  // of a warp's part: output, largest score, denominator
    int length[BATCH];                                   // tokens in the cache
};

struct RingCursor {  // a slot, and the parity of how often the ring has been gone round
    int slot = 0, phase = 0;
    DEVICE void next(int slots) {
        if (++slot == slots) slot = 0, phase ^= 1;
    }
};

struct Ring {
    Shared& shared;
    char* memory;
    int slots;
    RingCursor now, arriving, oldest;  // the slot whose turn it is; the first in flight; the first that is not released
    int in_flight = 0, occupied = 0;   // slots in flight; slots in flight, filled or read

    // The producer: a free slot, once few enough copies are in flight; memory_bound: one more may be
    DEVICE char* acquire(int bytes, bool memory_bound) {
        barrier_wait(shared.empty + now.slot, now.phase ^ 1);
        for (; occupied && barrier_done(shared.empty + oldest.slot, oldest.phase); occupied--) oldest.next(slots);
        int limit = least(slots, 1 + (occupied++ < PREFETCH_DEPTH) + memory_bound);
        for (; in_flight >= limit; in_flight--) {
            barrier_wait(shared.full + arriving.slot, arriving.phase);
            arriving.next(slots);
        }
        in_flight++;
        barrier_expect(shared.full + now.slot, bytes);
        return memory + now.slot * SLOT;
    }
    DEVICE void copy(char* to, const char* from, int bytes) { copy_async(to, from, bytes, shared.full + now.slot); }
    DEVICE void advance() { now.next(slots); }
    // The consumers
    DEVICE const uint4* data() { return (const uint4*)(memory + now.slot * SLOT); }
    DEVICE void wait() { barrier_wait(shared.full + now.slot, now.phase); }
    DEVICE void release(unsigned read, bool really = true) {
        __syncwarp();
        if (threadIdx.x % 32 == 0 && really) barrier_arrive_after(read, shared.empty + now.slot);
        if (really) now.next(slots);
    }
};


// ---------------------------------------------------------------------------------------------------------------------
// A thread block. table[layer]: addresses of qkv, proj, fc1's V and U, fc2's V and U (a single matrix stands twice),
// keys, values and the layer's vectors: those of norm1 and qkv, of proj, of norm2 and fc1, of fc2. Of a linear that is
// its bias. Of a norm and the first matrix after it: the gain, the matrix times the gain, and the matrix times the
// shift plus its bias.

struct Arguments {
    const long long* token;
    long long* position;
    const Weight *wte, *wpe, *head;
    const float *cos, *sin;
    const u64* table;
    const float* head_norm;
    Tagged *x, *y, *qkv, *part, *lse, *rank1, *rank2, *hidden;  // x: a layer's input; y: attention added to it
    Weight* logits;
    u64* counter;                  // of CTAs that began, in all launches; after it, of stages that CTAs finished
    long long length;
    float eps;
};

struct ThreadBlock : Arguments {
    Shared& shared;
    Ring ring;
    u64 launch;
    unsigned epoch;                // of what this layer publishes
    int parity = 0;                // which half of shared.partial this round writes
    unsigned* stages;              // finished by CTAs, in all launches; it may overflow
    unsigned target;

    DEVICE ThreadBlock(const Arguments& a, Shared& shared, Ring ring) : Arguments(a), shared(shared), ring(ring) {
        launch = load_acquire(counter) / GRID;  // all CTAs of this launch begin before one of the next does
        epoch = epoch_of_layer(0);
        stages = (unsigned*)(counter + 1);
        target = launch * STAGES * GRID;
    }

    // ---- The producer

    template <class M> DEVICE void produce(u64 matrix, bool memory_bound) {
        constexpr int together = M::addends > 1 ? 1 : M::slot;  // rows that are one piece of memory
        M my;
        ROLL for (int done = 0; done < my.count; done += M::slot) {
            int rows = least(M::slot, my.count - done);
            char* to = ring.acquire(rows * M::bytes, memory_bound);
            ROLL for (int r = 0; r < rows; r += together)
                ring.copy(to + r * M::bytes, (char*)matrix + my.start(done + r), least(together, rows - r) * M::bytes);
            ring.advance();
        }
    }

    DEVICE void produce_cache(u64 keys, u64 values, bool memory_bound) {
        constexpr int bytes = D * sizeof(Weight);
        ROLL for (int item = blockIdx.x; item < ITEMS; item += GRID) {
            Item my(item, shared.length);
            int first = my.first, stop = my.stop;
            long long start = my.cache() * length;
            ROLL for (; first < stop; first += POSITIONS) {
                int size = least(POSITIONS, stop - first) * bytes;
                char* to = ring.acquire(2 * size, memory_bound);
                ring.copy(to, (const char*)keys + (start + first) * bytes, size);
                ring.copy(to + SLOT / 2, (const char*)values + (start + first) * bytes, size);
                ring.advance();
            }
        }
    }

    template <class Fc1, class Fc2> DEVICE void produce_layers(int begin, int end) {
        constexpr int stages = 3 + Fc1::factors + Fc2::factors;
        constexpr int all = QKV::share_bytes + PROJ::share_bytes + Fc1::share_bytes + Fc2::share_bytes;
        constexpr bool memory_bound = all > LONG_SHARE * SLOT * stages;
        ROLL for (int layer = begin; layer < end; layer++) {
            const u64* row = shared.table[layer];
            produce<QKV>(row[0], memory_bound);
            produce_cache(row[6], row[7], memory_bound);
            produce<PROJ>(row[1], memory_bound);
            produce<typename Fc1::First>(row[2], memory_bound);
            if constexpr (Fc1::factors == 2) produce<typename Fc1::Last>(row[3], memory_bound);
            produce<typename Fc2::First>(row[4], memory_bound);
            if constexpr (Fc2::factors == 2) produce<typename Fc2::Last>(row[5], memory_bound);
        }
    }

    // ---- Publishing and polling

    DEVICE unsigned epoch_of_layer(int layer) { return launch % 2 * 2 + layer % 2; }

    DEVICE void stage_done() {
        if (threadIdx.x == 0) add_relaxed(stages);
        target += GRID;
    }

    DEVICE void wait_for_stage() {  // until polling is worth while
        if (threadIdx.x == 0)
            while ((int)(load_hint(stages) - target) < -EARLY) pause();
        sync_consumers();
    }

    DEVICE float receive(Tagged last, const Tagged* from) {  // one, loaded before as `last`
        while (epoch_of(last) != epoch) pause(), last = load_relaxed(from);
        return value_of(last);
    }

    // n pieces of E tagged floats, all requested at once: piece c, if needed(c), begins at where(c)
    template <int n, class Needed, class Where> DEVICE void receive(float (&out)[n][E], Needed needed, Where where) {
        for (bool all = false; !all;) {
            all = true;
            UNROLL for (int c = 0; c < n; c++)
                if (needed(c)) {
                    const Tagged* from = where(c);
                    UNROLL for (int e = 0; e < E; e += 4) {
                        Tagged four[4];
                        load_relaxed(four, from + e / 4 * 128);
                        UNROLL for (int i = 0; i < 4; i++) {
                            out[c][e + i] = value_of(four[i]);
                            all &= epoch_of(four[i]) == epoch;
                        }
                    }
                }
            if (!all) pause();
        }
    }

    DEVICE void publish(Tagged* to, float value, unsigned epoch) { store_relaxed(to, tagged(value, epoch)); }
    DEVICE void publish(Weight* to, float value, unsigned) { narrow(value, *to); }
    DEVICE int place_in(const Tagged*, int b, int n, int size) { return b * row_of(size) + place_of(n); }
    DEVICE int place_in(const Weight*, int b, int n, int size) { return b * size + n; }

    // ---- The input of a linear: a thread's pieces of a block of every sequence's row, from entry k on, a group apart

    // Each warp's share of the sums over every sequence's row and over its squares; a thread has `count` of n pieces
    template <int n> DEVICE void sum_moments(const float (*rows)[E], int count) {
        constexpr int all = 2 * power_of_two(BATCH);
        float sums[all];
        UNROLL for (int i = 0; i < all; i++) sums[i] = 0;
        UNROLL for (int b = 0; b < BATCH; b++)
            UNROLL for (int c = 0; c < n; c++)
                if (c < count) {
                    UNROLL for (int e = 0; e < E; e++) sums[2 * b] += rows[b * n + c][e];
                    sums[2 * b + 1] += dot(rows[b * n + c], rows[b * n + c]);
                }
        float sum = sums_over_warp<all>(sums);
        int lane = threadIdx.x % 32;
        if (lane % (32 / all) == 0) shared.moments[threadIdx.x / 32][lane * all / 32] = sum;
    }

    // W norm(x) from W (gain x) = sum and W gain, after the sync that follows sum_moments; W shift is in the bias. In
    // one pass: float32 has digits to spare as long as a row's mean is not a hundred deviations from zero.
    DEVICE float normed(float sum, float of_gain, int b) {
        float mean = 0, square = 0;
        UNROLL for (int w = 0; w < WARPS; w++) mean += shared.moments[w][2 * b], square += shared.moments[w][2 * b + 1];
        mean = RMS ? 0 : mean / N;
        return (sum - mean * of_gain) * rsqrtf(fmaxf(square / N - mean * mean, 0) + eps);
    }

    // a = gain x, and the moments of whole rows: from these pieces where the group has all of them, else from pieces
    // read besides
    template <class M>
    DEVICE void input_normed(Pieces<M>& a, const Tagged* from, const float* gains, int k, int count) {
        constexpr bool whole = M::groups == 1 && M::blocks == 1;
        constexpr int apart = M::group * E, pieces = BATCH * M::each, stride = row_of(M::K * M::blocks);
        constexpr int row = whole ? 0 : (N / E + THREADS - 1) / THREADS;   // pieces of a whole row for each thread
        int rest = N / E % THREADS == 0 ? row : (N / E - (int)threadIdx.x + THREADS - 1) / THREADS;
        float in[pieces + BATCH * row][E], gain[M::each][E];
        UNROLL for (int c = 0; c < M::each; c++)
            if (c < count) load(gain[c], gains + k + c * apart);                        // before the wait
        wait_for_stage();
        receive(in, [&](int i) { return i < pieces ? i % M::each < count : (i - pieces) % most(1, row) < rest; },
            [&](int i) {
                int j = i - pieces;
                if (i < pieces) return from + i / M::each * stride + place_of(k) + i % M::each * apart;
                return from + j / most(1, row) * stride + place_of(threadIdx.x * E) + j % most(1, row) * THREADS * E;
            });
        if constexpr (whole) sum_moments<M::each>(in, threadIdx.x < M::group ? count : 0);
        if constexpr (!whole) sum_moments<row>(in + pieces, rest);
        UNROLL for (int i = 0; i < pieces; i++)
            UNROLL for (int e = 0; e < E; e++) a[i][e] = in[i][e] * gain[i % M::each][e];
    }

    // a = attention's output from `splits` parts, n at a time; each has the logarithm of its softmax's denominator
    template <class M, int n> DEVICE void merge_splits(Pieces<M>& a, int splits, int k, int count) {
        constexpr int pieces = BATCH * M::each, apart = M::group * E;
        float top[pieces], sum[pieces];
        UNROLL for (int p = 0; p < pieces; p++) {
            top[p] = -1e30f, sum[p] = 0;
            UNROLL for (int e = 0; e < E; e++) a[p][e] = 0;
        }
        ROLL for (int first = 0; first < splits; first += n) {
            float in[pieces * n][E], each[n];
            Tagged logs[pieces * n];
            auto needed = [&](int i) { return i / n % M::each < count; };
            auto at = [&](int i) { return (first + i % n) * BATCH + i / n / M::each; };  // part and sequence
            auto head = [&](int i) { return (k + i / n % M::each * apart) / D; };
            auto log_of = [&](int i) { return lse_copy(blockIdx.x) + at(i) * HEADS + head(i); };
            UNROLL for (int i = 0; i < pieces * n; i++)
                if (needed(i)) logs[i] = load_relaxed(log_of(i));
            receive(in, needed,
                [&](int i) { return part + at(i) * row_of(HEADS * D) + place_of(k) + i / n % M::each * apart; });
            UNROLL for (int p = 0; p < pieces; p++)
                if (needed(p * n)) {
                    float before = top[p];
                    UNROLL for (int s = 0; s < n; s++) {
                        each[s] = receive(logs[p * n + s], log_of(p * n + s));
                        top[p] = fmaxf(top[p], each[s]);
                    }
                    float rescale = __expf(before - top[p]);
                    sum[p] *= rescale;
                    UNROLL for (int e = 0; e < E; e++) a[p][e] *= rescale;
                    UNROLL for (int s = 0; s < n; s++) {
                        float weight = __expf(each[s] - top[p]);
                        sum[p] += weight;
                        UNROLL for (int e = 0; e < E; e++) a[p][e] += weight * in[p * n + s][e];
                    }
                }
        }
        UNROLL for (int p = 0; p < pieces; p++)
            UNROLL for (int e = 0; e < E; e++) a[p][e] /= sum[p];
    }

    template <class M> DEVICE void input_attention(Pieces<M>& a, int k, int count) {
        constexpr int n = least(SPLITS, most(1, 2 / (BATCH * M::each)));  // parts at a time; more were slower
        int splits = 1;
        UNROLL for (int b = 0; b < BATCH; b++) splits = most(splits, splits_of(shared.length[b]));
        if (splits > 1) return merge_splits<M, n>(a, splits, k, count);
        receive(a, [&](int i) { return i % M::each < count; },
            [&](int i) { return part + i / M::each * row_of(HEADS * D) + place_of(k) + i % M::each * M::group * E; });
    }

    // a = pieces of a sum of ADDENDS rows. The groups share them: one thread requests each, the others get it through
    // `through`.
    template <class M, int ADDENDS>
    DEVICE void input_shared(Pieces<M>& a, const Tagged* from, int block, float* through) {
        constexpr int pieces = BATCH * M::pieces, each = (pieces + THREADS - 1) / THREADS;
        constexpr int size = M::K * M::blocks, stride = row_of(size * ADDENDS);
        float in[each * ADDENDS][E];
        receive(in, [&](int i) { return i / ADDENDS * THREADS + threadIdx.x < pieces; },
            [&](int i) {
                int piece = i / ADDENDS * THREADS + threadIdx.x, of_addend = i % ADDENDS * size + block * M::K;
                return from + piece / M::pieces * stride + place_of(of_addend + piece % M::pieces * E);
            });
        UNROLL for (int p = 0; p < each; p++)
            if (p * THREADS + threadIdx.x < pieces)
                UNROLL for (int e = 0; e < E; e++) {
                    float sum = 0;
                    UNROLL for (int n = 0; n < ADDENDS; n++) sum += in[p * ADDENDS + n][e];
                    through[(p * THREADS + threadIdx.x) * E + e] = sum;
                }
        sync_consumers();
        UNROLL for (int b = 0; b < BATCH; b++)
            if (M::has(0)) load(a[b], through + (b * M::pieces + threadIdx.x % M::group) * E);
    }

    // a = pieces of a sum of ADDENDS rows, or, GATE, silu(the first half of the row) x the second half
    template <class M, bool GATE, int ADDENDS>
    DEVICE void input_own(Pieces<M>& a, const Tagged* from, int k, int count) {
        constexpr int apart = M::group * E, pieces = BATCH * M::each, size = M::K * M::blocks;
        constexpr int terms = GATE ? 2 : ADDENDS, stride = row_of(size * terms);
        float in[pieces * terms][E];
        receive(in, [&](int i) { return i % M::each < count; },
            [&](int i) {
                int j = i - pieces;
                if (i < pieces) return from + i / M::each * stride + place_of(k) + i % M::each * apart;
                int of_term = place_of((j / pieces + 1) * size + k);
                return from + j / M::each % BATCH * stride + of_term + j % M::each * apart;
            });
        UNROLL for (int i = 0; i < pieces; i++)
            UNROLL for (int e = 0; e < E; e++) {
                a[i][e] = in[i][e];
                UNROLL for (int n = 1; n < ADDENDS; n++) a[i][e] += in[n * pieces + i][e];
                if constexpr (GATE) a[i][e] = a[i][e] / (1 + __expf(-a[i][e])) * in[pieces + i][e];
            }
    }

    template <class M, Input IN, int ADDENDS>
    DEVICE void input(Pieces<M>& a, const Tagged* from, const float* gains, int block) {
        int member = threadIdx.x % M::group, k = block * M::K + member * E;
        int count = M::pieces % M::group == 0 ? M::each : (M::pieces - member + M::group - 1) / M::group;
        if constexpr (IN == NORMED) return input_normed<M>(a, from, gains, k, count);
        wait_for_stage();
        if constexpr (IN == PARTS)
            input_attention<M>(a, k, count);
        else if constexpr (IN == PLAIN && BATCH > 1 && M::groups > 1 && BATCH * M::K <= THREADS * WARPS)
            input_shared<M, ADDENDS>(a, from, block, shared.partial[parity ^ 1]);  // which the stage before has read
        else
            input_own<M, IN == GATED, ADDENDS>(a, from, k, count);
    }

    // ---- A linear

    // This thread's pieces of a slot, or, without a branch, of what lies near where it has none -> a value of all reads
    template <class M> DEVICE unsigned load_pieces(uint4 (&w)[M::rows * M::each]) {
        int first = threadIdx.x / M::group * M::pieces + threadIdx.x % M::group;
        unsigned read = 0;
        UNROLL for (int i = 0; i < M::rows * M::each; i++) {
            int piece = first + i / M::each * M::groups * M::pieces + i % M::each * M::group;
            w[i] = ring.data()[M::even ? piece : least(piece, SLOT / 16 - 1)];
            read ^= w[i].x;
        }
        return read;
    }

    // partial[warp][row][sequence] = this warp's share of the next `count` rows times a. The next slot is loaded before
    // this one is multiplied with, so that neither this nor the sums wait for it; what is loaded after the last one is
    // not used.
    template <class M> DEVICE void multiply(float* partial, const Pieces<M>& a, int count) {
        constexpr int n = power_of_two(M::several * M::rows), all = n * power_of_two(BATCH);
        int group = threadIdx.x / M::group, member = threadIdx.x % M::group, lane = threadIdx.x % 32;
        int b = lane * all / 32 / n, i = lane * all / 32 % n;  // whose sum this lane gets
        bool writes = lane % (32 / all) == 0 && b < BATCH && i < M::several * M::rows && M::in_group();
        partial += member / 32 * THREADS + (i / M::rows * M::slot + i % M::rows * M::groups + group) * BATCH + b;
        constexpr int ahead = BATCH <= 2;  // else registers are short
        uint4 now[M::rows * M::each], next[M::rows * M::each];
        if (ahead) ring.wait(), ring.release(load_pieces<M>(now));
        ROLL for (int done = 0; done < count; done += M::several * M::slot) {
            float sums[all];
            UNROLL for (int i = 0; i < all; i++) sums[i] = 0;
            UNROLL for (int s = 0; s < M::several; s++) {
                bool more = done + (s + ahead) * M::slot < count;
                if (!ahead && !more) continue;
                if (more) ring.wait();
                unsigned read = load_pieces<M>(ahead ? next : now);
                UNROLL for (int i = 0; i < M::rows * M::each; i++)
                    if (M::has(i % M::each)) {
                        float w[E];
                        unpack(now[i], w);
                        UNROLL for (int b = 0; b < BATCH; b++)
                            sums[b * n + s * M::rows + i / M::each] += dot(w, a[b * M::each + i % M::each]);
                    }
                ring.release(read, more);
                UNROLL for (int i = 0; ahead && i < M::rows * M::each; i++) now[i] = next[i];
            }
            float sum = sums_over_warp<all>(sums);
            if (writes) partial[done * BATCH] = sum;
        }
    }

    // to = act(matrix input + bias) + old for every sequence, published with epoch `result`. norm: where the input is
    // normed, its gain and the matrix times it
    template <class M, Input IN, bool ACTIVATE, int ADDENDS = 1, class T> DEVICE void linear(
            const Tagged* from, const float* norm, const float* bias, const Tagged* old, T* to, unsigned result) {
        M my;
        float a[BATCH * M::each][E];
        int b = threadIdx.x / M::round, row = threadIdx.x % M::round;  // whose output this thread publishes
        ROLL for (int begin = 0; begin < my.count; begin += M::round) {
            int count = least(M::round, my.count - begin);
            int place = my.place(begin + row), at = place_in(to, b, place, M::all);
            bool mine = b < BATCH && row < count;
            float sum = 0, shift = bias && mine ? bias[place] : 0, of_gain = IN == NORMED && mine ? norm[N + place] : 0;
            float* partial = shared.partial[parity ^= 1];
            if (begin == 0) input<M, IN, ADDENDS>(a, from, norm, my.block);
            Tagged before = old && mine ? load_relaxed(old + at) : 0;
            multiply<M>(partial, a, count);
            sync_consumers();  // two rounds from now, when all are past the next sync, `partial` is written again
            if (mine) {
                UNROLL for (int w = 0; w < M::group / 32; w++) sum += partial[w * THREADS + row * BATCH + b];
                if (IN == NORMED) sum = normed(sum, of_gain, b);
                sum += shift;
                if (ACTIVATE) sum = activate(sum);
                if (old) sum += receive(before, old + at);
                publish(to + at, sum, result);
            }
        }
        stage_done();
    }

    // ---- Attention

    // A team's running softmax over its part of a slot, which holds `size` positions
    DEVICE void attend(const uint4* slot, int size, const float (&q)[E], float (&out)[E], float& top, float& sum) {
        constexpr int teams = TEAMS / WARP_GROUPS, n = POSITIONS / teams;
        int team = threadIdx.x / 32 / WARP_GROUPS * (32 / MEMBERS) + threadIdx.x % 32 / MEMBERS;
        int member = threadIdx.x % MEMBERS;
        float scores[n], before = top, k[E], v[E];
        UNROLL for (int j = 0; j < n; j++) {
            unpack(slot[(j * teams + team) * MEMBERS + member], k);
            scores[j] = sum_over<MEMBERS>(dot(q, k));
            if (j * teams + team < size) top = fmaxf(top, scores[j]);
        }
        float rescale = __expf(before - top);
        sum *= rescale;
        UNROLL for (int e = 0; e < E; e++) out[e] *= rescale;
        UNROLL for (int j = 0; j < n; j++)
            if (j * teams + team < size) {
                float weight = __expf(scores[j] - top);
                unpack(slot[SLOT / 32 + (j * teams + team) * MEMBERS + member], v);
                sum += weight;
                UNROLL for (int e = 0; e < E; e++) out[e] += weight * v[e];
            }
    }

    // The new token begins the running softmax of one team, so nothing just stored is read
    DEVICE void attend_new(const Item& my, const float (&q)[E], float (&key)[E], const float (&value)[E],
                           const float (&half)[E], const float (&rotation)[2][E], Weight* keys, Weight* values,
                           float (&out)[E], float& top, float& sum) {
        int at = threadIdx.x % MEMBERS * E;
        bool first = threadIdx.x % 32 < MEMBERS;
        long long here = (my.cache() * length + my.length) * D + at;
        UNROLL for (int e = 0; e < E; e++) {
            if (ROPE) key[e] = key[e] * rotation[0][e] + half[e] * rotation[1][e];
            Weight k, v;
            narrow(key[e], k), narrow(value[e], v);
            if (first && my.head % (HEADS / KV) == 0) keys[here + e] = k, values[here + e] = v;
            key[e] = wide(k);
            if (first) out[e] = wide(v);
        }
        float score = sum_over<MEMBERS>(dot(q, key));
        if (first) top = score, sum = 1;
    }

    DEVICE void attention(Weight* keys, Weight* values) {
        int warp = threadIdx.x / 32, at = threadIdx.x % MEMBERS * E;
        bool first = threadIdx.x % 32 < MEMBERS;  // team of the warp
        ROLL for (int item = blockIdx.x; item < ITEMS; item += GRID) {
            Item my(item, shared.length);
            if (my.first > 0 && my.first >= my.length) {
                publish_empty(item);
                continue;
            }
            bool has_new = my.first == 0 && warp == 1 % WARP_GROUPS;  // of the warp group that has the fewest slots
            // in: query, key, value; the other half of query and of key
            float rotation[2][E], in[5][E], out[E] = {}, top = -1e30f, sum = 0;
            if (ROPE) load(rotation[0], cos + my.length * D + at), load(rotation[1], sin + my.length * D + at);
            int from[5];
            UNROLL for (int c = 0; c < 5; c++) {
                int which = c % 3 == 0 ? my.head : c % 3 == 1 ? HEADS + my.kv : HEADS + KV + my.kv;
                from[c] = my.b * row_of(QKV::all) + place_of(which * D + (c > 2 ? (at + D / 2) % D : at));
            }
            if (item == blockIdx.x) wait_for_stage();  // what later items read is there by then, or nearly
            receive(in, [&](int c) { return c < 3 || ROPE; }, [&](int c) { return qkv + from[c]; });
            float (&q)[E] = in[0];
            UNROLL for (int e = 0; e < E; e++) {
                if (ROPE) q[e] = q[e] * rotation[0][e] + in[3][e] * rotation[1][e];  // sin begins negative
                q[e] *= rsqrtf(D);
            }
            if (has_new) attend_new(my, q, in[1], in[2], in[4], rotation, keys, values, out, top, sum);
            ROLL for (int start = my.first, order = warp; start < my.stop; start += POSITIONS, order++) {
                ring.wait();
                if (order % WARP_GROUPS == 0) attend(ring.data(), my.stop - start, q, out, top, sum);
                ring.release(__float_as_uint(out[0]));
            }
            UNROLL for (int o = MEMBERS; o < 32; o *= 2) {  // the teams of a warp
                float higher = fmaxf(top, shuffle(top, o)), rescale = __expf(top - higher);
                top = higher, sum *= rescale, sum += shuffle(sum, o);
                UNROLL for (int e = 0; e < E; e++) out[e] *= rescale, out[e] += shuffle(out[e], o);
            }
            if (item != blockIdx.x) sync_consumers();  // the item before this one is published
            if (first) {
                UNROLL for (int e = 0; e < E; e++) shared.heads[warp][at + e] = out[e];
                shared.largest[warp] = top, shared.sums[warp] = sum;
            }
            sync_consumers();
            publish_part(item);
        }
        stage_done();
    }

    DEVICE Tagged* lse_copy(int i) { return lse + i % COPIES * ITEMS; }
    DEVICE Tagged* part_of(int item, int d) {
        return part + item / HEADS * row_of(HEADS * D) + place_of(item % HEADS * D + d);
    }

    DEVICE void publish_part(int item) {  // the warps' outputs merged, and the logarithm of the denominator
        float top = -1e30f;
        UNROLL for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.largest[w]);
        ROLL for (int d = threadIdx.x; d < D; d += THREADS) {
            float sum = 0, out = 0;
            UNROLL for (int w = 0; w < WARPS; w++) {
                float rescale = __expf(shared.largest[w] - top);
                sum += rescale * shared.sums[w], out += rescale * shared.heads[w][d];
            }
            publish(part_of(item, d), out / sum, epoch);
            if (d < COPIES) publish(lse_copy(d) + item, top + __logf(sum), epoch);
        }
    }

    DEVICE void publish_empty(int item) {  // a part of no weight: some of these are read, and epochs must not grow old
        ROLL for (int d = threadIdx.x; d < D; d += THREADS) publish(part_of(item, d), 0, epoch);
        if (threadIdx.x < COPIES) publish(lse_copy(threadIdx.x) + item, -1e30f, epoch);
    }

    // ---- The step

    // bias: of the first matrix where its input is normed, followed by that of the last one
    template <class F, Input IN, bool ACTIVATE> DEVICE void ffn_linear(
            const Tagged* from, const float* norm, const float* bias, Tagged* rank, const Tagged* old, Tagged* to,
            unsigned result) {
        typedef typename F::First First;
        typedef typename F::Last Last;
        if constexpr (F::factors == 2) {
            linear<First, IN, false>(from, norm, IN == NORMED ? bias : nullptr, nullptr, rank, epoch);
            bias = IN == NORMED ? bias + First::all : bias;
            linear<Last, PLAIN, ACTIVATE, First::addends>(rank, nullptr, bias, old, to, result);
        } else
            linear<First, IN, ACTIVATE>(from, norm, bias, old, to, result);
    }

    template <class Fc1, class Fc2> DEVICE void consume_layers(int begin, int end) {
        typedef typename Fc1::First First;
        ROLL for (int layer = begin; layer < end; layer++) {
            const u64* row = shared.table[layer];
            const float *norm1 = (const float*)row[8], *qkv_bias = norm1 + N + QKV::all;
            const float *proj_bias = qkv_bias + QKV::all, *norm2 = proj_bias + N, *bias1 = norm2 + N + First::all;
            const float* bias2 = bias1 + First::all + (Fc1::factors == 2 ? Fc1::Last::all : 0);
            linear<QKV, NORMED, false>(x, norm1, qkv_bias, nullptr, qkv, epoch);
            attention((Weight*)row[6], (Weight*)row[7]);
            linear<PROJ, PARTS, false>(nullptr, nullptr, proj_bias, x, y, epoch);
            ffn_linear<Fc1, NORMED, true>(y, norm2, bias1, rank1, nullptr, hidden, epoch);
            ffn_linear<Fc2, ACT == SWIGLU ? GATED : PLAIN, false>(hidden, nullptr, bias2, rank2, y, x,
                                                                                epoch_of_layer(layer + 1));
            epoch = epoch_of_layer(layer + 1);
        }
    }

    template <class Fc1, class Fc2> DEVICE void layers(bool producer, int begin, int end) {
        if (producer)
            produce_layers<Fc1, Fc2>(begin, end);
        else
            consume_layers<Fc1, Fc2>(begin, end);
    }

    DEVICE void embed() {
        PROJ my;
        ROLL for (int i = threadIdx.x; i < my.count * BATCH; i += THREADS) {
            int b = i % BATCH, n = my.place(i / BATCH);
            publish(x + place_in(x, b, n, N),
                    wide(wte[token[b] * N + n]) + (wpe ? wide(wpe[(long long)shared.length[b] * N + n]) : 0), epoch);
        }
        stage_done();
    }

    DEVICE void produce_all() {
        LAYERS_OF(true)
        produce<HEAD>((u64)head, true);
    }

    DEVICE void consume_all() {
        if (threadIdx.x == 0) add_release(counter);  // after this CTA has read the counter and the positions
        embed();
        LAYERS_OF(false)
        linear<HEAD, NORMED, false>(x, head_norm, head_norm + N + HEAD::all, nullptr, logits, 0);
        if (blockIdx.x == 0 && threadIdx.x < BATCH) {
            while (load_acquire(counter) < (launch + 1) * GRID) pause();  // until all have read the positions
            position[threadIdx.x] = least(shared.length[threadIdx.x] + 1, length - 1);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) decode_step(Arguments arguments) {
    Shared& shared = *(Shared*)shared_memory();
    constexpr int before = (sizeof(Shared) + 127) / 128 * 128;
    int slots = least(MAX_SLOTS, (shared_bytes() - before) / SLOT);
    if (threadIdx.x < slots) {
        barrier_init(shared.full + threadIdx.x, 1);
        barrier_init(shared.empty + threadIdx.x, WARPS);
    }
    if (threadIdx.x < BATCH) shared.length[threadIdx.x] = arguments.position[threadIdx.x];
    for (int i = threadIdx.x; i < LAYERS * 9; i += blockDim.x) shared.table[i / 9][i % 9] = arguments.table[i];
    ThreadBlock block(arguments, shared, Ring{shared, shared_memory() + before, slots});
    __syncthreads();
    if (threadIdx.x < THREADS) {
        more_registers();
        block.consume_all();
    } else {
        fewer_registers();
        if (threadIdx.x == THREADS) block.produce_all();
    }
}
