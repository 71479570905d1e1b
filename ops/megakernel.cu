// A decoding step of a few sequences as one kernel that stays on the GPU from the embedding to the logits.
//
// At such batches a step reads every weight once and computes next to nothing: what counts is that memory never idles. Each multiprocessor
// runs one program: one warp that fetches and WARPS that compute. All matrices are cut into shares of rows, one share a program, which
// lie in one piece in memory; of a few long rows, programs also share the columns. The fetching warp asks the copy engine for its program's
// shares, and its part of the KV cache, in the order in which they will be used, as long as a ring of slots in shared memory has room: half
// a layer ahead. What others compute never holds it up. The computing warps go from stage to stage: the embedding, then qkv, attention, proj
// and one stage for each factor of the FFN, layer by layer, then the head.
//
// What a stage finds goes to the other programs as words in global memory, which stay in L2: a float32 whose last two bits are a tag,
// the parities of launch and layer. Who needs a word reads it until it has the tag of now; before, it has that of the layer before, or of
// the launch before. So nothing waits for stores to arrive, as a barrier would. A counter of stages done only says when it is worth
// to look: to ask for the words themselves all the time would be in the way of those that write them.
//
// No word is overwritten before all have read it: its next writer, since it has rows of qkv, has by way of the stages between waited for all
// words of qkv's input, so for all programs to have done the layer before.
//
// The host sets as macros: BATCH (sequences), Weight (bf16 or float), GRID, WARPS, SLOT (bytes), N, HEADS, KV, D, LAYERS, STAGES, SPLITS, COPIES, ROPE, RMS, ACT,
// QKV, PROJ, HEAD (matrices), LAYERS_OF (calls of `layers`, one for each run of layers of one kind).

struct bf16 { unsigned short bits; };
enum Activation { GELU, RELU2, SWIGLU };
enum Input { PLAIN, NORMED, PARTS, GATED };
typedef unsigned long long u64;
typedef unsigned Word;                   // of an activation: a float whose last two bits are a tag, that of its layer and launch

constexpr int THREADS = 32 * WARPS;      // that compute
constexpr int E = 16 / sizeof(Weight);   // weights in a piece: 16 bytes, what a thread loads at a time
constexpr int MOST_SLOTS = 32;
constexpr int ENOUGH = BATCH == 1 ? 8 : 6;  // slots filled or on their way; beyond them one at a time is asked for, below two: more would queue
                                         // before the memory, and activations behind them
constexpr int LONG = 6;                  // slots of a share beyond which, on average, memory is what all wait for: one more
constexpr int EARLY = 12;                // programs that may not be done with a stage when others look for its words
constexpr int REACH = BATCH == 1 ? 128 : 96 * BATCH;  // places of the cache that a program looks at at most, as long as there are programs


// ---------------------------------------------------------------------------------------------------------------------
// What the hardware does, as PTX; for a CPU, tests/emulate.h does it

#ifndef EMULATED
#define DEVICE __device__ __forceinline__

DEVICE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(arrivals));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
DEVICE void barrier_expect(u64* barrier, int bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u64* barrier, int phase) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}"
                 :: "r"(shared_address(barrier)), "r"(phase) : "memory");
}
DEVICE bool barrier_done(u64* barrier, int phase) {
    int done;
    asm volatile("{\n.reg .pred done;\nmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.s32 %0, 1, 0, done;\n}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(phase) : "memory");
    return done;
}
DEVICE void copy_async(void* to, const void* from, int bytes, u64* barrier) {
    asm volatile("{\n.reg .b64 once;\ncreatepolicy.fractional.L2::evict_first.b64 once, 1.0;\n"  // activations shall stay in L2
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once;\n}"
                 :: "r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
DEVICE void sync() {  // of the computing warps
    asm volatile("bar.sync 1, %0;" :: "n"(THREADS) : "memory");
}
DEVICE void arrive(u64* counter) { asm volatile("red.release.gpu.global.add.u64 [%0], 1;" :: "l"(counter) : "memory"); }
DEVICE u64 arrivals(const u64* counter) {
    u64 value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
    return value;
}
DEVICE void count(unsigned* counter) { asm volatile("red.relaxed.gpu.global.add.u32 [%0], 1;" :: "l"(counter)); }
DEVICE unsigned counted(const unsigned* counter) {
    unsigned value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter));
    return value;
}
DEVICE void write(Word* to, Word word) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" :: "l"(to), "r"(word)); }
DEVICE Word read(const Word* from) {
    Word word;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(word) : "l"(from));
    return word;
}
DEVICE void read_four(Word (&words)[4], const Word* from) {  // 16 aligned bytes
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from));
}
DEVICE void pause() {}  // where the CPU's threads take turns
#if __CUDA_ARCH__ == 900  // others may begin with fewer than 168, and then there are not enough to hand over
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
    const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
    #pragma unroll
    for (int i = 0; i < 4; i++)
        if constexpr (E == 8) {  // a bf16 is the upper half of a float
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
        } else
            out[i] = __uint_as_float(words[i]);
}

DEVICE float wide(bf16 a) { return __uint_as_float((unsigned)a.bits << 16); }
DEVICE float wide(float a) { return a; }
DEVICE void narrow(float a, float& out) { out = a; }
DEVICE void narrow(float a, bf16& out) {  // to nearest, ties to even
    unsigned bits = __float_as_uint(a);
    out.bits = a == a ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}

DEVICE void load(float (&out)[E], const float* from) {
    #pragma unroll
    for (int i = 0; i < E; i += 4) {
        float4 four = *(const float4*)(from + i);
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
}

// A row of words lies in memory in the order of threads' requests, 16 bytes each, with pieces as neighbours: first halves of 32 pieces, then the second ones.
constexpr int SPAN = 32 * E;
DEVICE constexpr int row_of(int n) { return (n + SPAN - 1) / SPAN * SPAN; }  // words of a row with n entries
DEVICE int place_of(int n) { return n / SPAN * SPAN + n % E / 4 * 128 + n % SPAN / E * 4 + n % 4; }

DEVICE Word word(float value, unsigned tag) { return (value == value ? __float_as_uint(value) + 2 & ~3u : 0x7fc00000) | tag; }
DEVICE float value_of(Word word) { return __uint_as_float(word & ~3u); }
DEVICE unsigned tag_of(Word word) { return word & 3; }

DEVICE float dot(const float (&a)[E], const float (&b)[E]) {
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < E; i++) sum += a[i] * b[i];
    return sum;
}

DEVICE float activate(float a) {
    if (ACT == RELU2) return a > 0 ? a * a : 0;
    if (ACT == GELU) return a / (1 + __expf(-1.5957691216f * (a + 0.044715f * a * a * a)));  // tanh-GELU is a sigmoid(u)
    return a;  // SWIGLU: where the next stage reads it
}

template <int n> DEVICE float sum_over(float value) {  // n neighbouring threads
    #pragma unroll
    for (int o = n / 2; o; o /= 2) value += shuffle(value, o);
    return value;
}

template <int n, int o = 16> DEVICE float sums_over_warp(float* values) {  // n sums at once; lane l gets that of values[l * n / 32]
    if constexpr (n == 1)
        return sum_over<2 * o>(values[0]);
    else {
        #pragma unroll
        for (int i = 0; i < n / 2; i++) {
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

constexpr int SUMS = BATCH == 1 ? 32 : 4;          // rows whose sums a warp finds at once at most: more code runs slower, since it is fetched in every layer

// BLOCKS blocks of ROWS x COLS, one below the other; block b maps entries b COLS to (b + 1) COLS. Row j's output goes to place
// j % SPREAD * (all rows / SPREAD) + j / SPREAD. A program has some neighbouring rows of one block, whose columns its threads share.
// SUMMED: the blocks lie side by side, and who reads the outputs adds them.
template <int ROWS, int COLS, int BLOCKS = 1, int SPREAD = ROWS * BLOCKS, bool SUMMED = false>
struct Matrix {
    static constexpr int addends = SUMMED ? BLOCKS : 1;
    static constexpr int all = ROWS * BLOCKS, K = COLS, blocks = BLOCKS, bytes = COLS * sizeof(Weight);
    static constexpr int pieces = K / E;                                                 // of a row
    static constexpr int group = least((pieces + 31) / 32 * 32, THREADS);                // threads that share a row, whole warps
    static constexpr int groups = THREADS / group;
    static constexpr int each = (pieces + group - 1) / group;                            // pieces of a row for each thread
    static constexpr bool even = THREADS % group == 0 && pieces % group == 0;            // all threads have the same number of pieces
    static constexpr int rows = most(1, least(SLOT / bytes / groups, SUMS));             // of a slot for each group
    static constexpr int slot = rows * groups;                                           // rows in a slot
    static constexpr int share = (ROWS + GRID / BLOCKS - 1) / (GRID / BLOCKS);           // rows of a program at most
    static constexpr int share_bytes = share * bytes;
    static constexpr int several = most(1, least(least(SUMS, 8) / rows, (share + slot - 1) / slot));  // slots whose sums are found together
    static constexpr int round = THREADS / BATCH / (slot * several) * slot * several;    // rows between two looks at the sums
    static_assert(slot * bytes <= SLOT && round > 0 && COLS % E == 0 && BLOCKS <= GRID, "the host plans for this");

    int block, first, count;                                                             // of this program: first of all rows
    DEVICE Matrix() {
        constexpr int programs = GRID / BLOCKS;                                          // of a block
        int i = blockIdx.x % programs, begin = ROWS * i / programs;
        bool idle = blockIdx.x >= programs * BLOCKS;
        block = idle ? 0 : blockIdx.x / programs;
        first = block * ROWS + begin;
        count = idle ? 0 : ROWS * (i + 1) / programs - begin;
    }
    DEVICE static bool in_group() { return THREADS % group == 0 || threadIdx.x < groups * group; }
    DEVICE static bool has(int piece) { return in_group() && (pieces % group == 0 || piece * group + threadIdx.x % group < pieces); }  // a thread
    DEVICE long long start(int row) const {                                              // its first byte
        return SUMMED ? ((long long)(first + row - block * ROWS) * BLOCKS + block) * bytes : (long long)(first + row) * bytes;
    }
    DEVICE int place(int row) const { return (first + row) % SPREAD * (all / SPREAD) + (first + row) / SPREAD; }
};

template <class A> struct Dense {
    typedef A First;
    typedef A Last;
    static constexpr int factors = 1, share_bytes = A::share_bytes;
};
template <class A, class B> struct Factors {
    typedef A First;
    typedef B Last;
    static constexpr int factors = 2, share_bytes = A::share_bytes + B::share_bytes;
};

constexpr int MEMBERS = D / E;                     // threads that share a place of the cache, a team
constexpr int TEAMS = THREADS / MEMBERS;
constexpr int PLACES = SLOT / 2 / (16 * MEMBERS);  // in a slot: keys in its first half, values in its second
constexpr int GANGS = least(4, WARPS);              // of warps, which take slots in turn: more scores at once, in the place of one after the other
static_assert(PLACES % TEAMS == 0 && 32 % MEMBERS == 0, "the host plans for this");

// A part of attention: a query head of a sequence and some places of its cache.
constexpr int ITEMS = SPLITS * BATCH * HEADS;
DEVICE int parts_of(int place) { return most(1, least(SPLITS, (place + REACH - 1) / REACH)); }
struct Item {
    int head, kv, b, place, first, stop;
    DEVICE Item(int item, const int* places) {
        head = item % HEADS, kv = head / (HEADS / KV), b = item / HEADS % BATCH, place = places[b];
        int parts = parts_of(place), reach = most(1, (place + parts - 1) / parts);
        first = item / (HEADS * BATCH) * reach, stop = least(first + reach, place);
    }
    DEVICE long long cache() const { return b * KV + kv; }  // row of the cache
};

struct Shared {
    u64 full[MOST_SLOTS], empty[MOST_SLOTS];        // barriers of the ring
    u64 table[LAYERS][9];
    alignas(16) float partial[2][THREADS * WARPS];  // sums of rows by warp, in turn
    float moments[WARPS][2 * power_of_two(BATCH)];  // of each warp's part of the rows to be normed: sum, sum of squares
    float heads[WARPS][D], largest[WARPS], sums[WARPS];  // of each warp's part of the cache: output, largest score, denominator
    int place[BATCH];                               // tokens in the cache
};

struct Lap {  // a slot, and the parity of how often the ring has been gone round
    int slot = 0, phase = 0;
    DEVICE void next(int slots) {
        if (++slot == slots) slot = 0, phase ^= 1;
    }
};

struct Ring {
    Shared& shared;
    char* memory;
    int slots;
    Lap now, late, back;           // the slot whose turn it is; the first of those still coming; the first of those not yet given back
    int coming = 0, held = 0;      // slots on their way; these and what is filled and not given back

    // the fetching thread
    DEVICE char* room(int bytes, bool hurry) {
        barrier_wait(shared.empty + now.slot, now.phase ^ 1);
        for (; held && barrier_done(shared.empty + back.slot, back.phase); held--) back.next(slots);
        int limit = least(slots, 1 + (held++ < ENOUGH) + hurry);
        for (; coming >= limit; coming--) {
            barrier_wait(shared.full + late.slot, late.phase);
            late.next(slots);
        }
        coming++;
        barrier_expect(shared.full + now.slot, bytes);
        return memory + now.slot * SLOT;
    }
    DEVICE void fetch(char* to, const char* from, int bytes) { copy_async(to, from, bytes, shared.full + now.slot); }
    DEVICE void filled() { now.next(slots); }
    // the computing threads
    DEVICE const uint4* data() { return (const uint4*)(memory + now.slot * SLOT); }
    DEVICE void wait() { barrier_wait(shared.full + now.slot, now.phase); }
    DEVICE void give_back(bool really = true) {
        __syncwarp();
        if (threadIdx.x % 32 == 0 && really) barrier_arrive(shared.empty + now.slot);
        if (really) now.next(slots);
    }
};


// ---------------------------------------------------------------------------------------------------------------------
// A program. table[layer]: addresses of qkv, proj, fc1's V and U, fc2's V and U (where there is one matrix, it stands twice), keys, values and
// the layer's vectors: those of norm1 and qkv, of proj, of norm2 and fc1, of fc2; of a linear its bias; of a norm and the first matrix behind it
// the gain, the matrix times the gain, and the matrix times the shift plus its bias.

struct Arguments {
    const long long* token;
    long long* position;
    const Weight *wte, *wpe, *head;
    const float *cos, *sin;
    const u64* table;
    const float* head_norm;
    Word *x, *y, *qkv, *part, *lse, *rank1, *rank2, *hidden;  // x: what a layer begins with; y: with attention added
    Weight* logits;
    u64* counter;                                              // of programs that began, in all launches; behind it, of stages that programs did
    long long length;
    float eps;
};

struct Program : Arguments {
    Shared& shared;
    Ring ring;
    u64 launch;
    unsigned tag;                  // of this layer's words
    int turn = 0;
    unsigned* stages;              // done by programs, in all launches; it may overflow
    unsigned target;

    DEVICE Program(const Arguments& arguments, Shared& shared, Ring ring) : Arguments(arguments), shared(shared), ring(ring) {
        launch = arrivals(counter) / GRID;  // all programs of this launch begin before one of the next does
        tag = tag_of_layer(0);
        stages = (unsigned*)(counter + 1);
        target = launch * STAGES * GRID;
    }

    // ---- The fetching thread

    template <class M> DEVICE void fetch(u64 matrix, bool hurry) {
        constexpr int together = M::addends > 1 ? 1 : M::slot;                           // rows that are one piece of memory
        M my;
        #pragma unroll 1
        for (int done = 0; done < my.count; done += M::slot) {
            int rows = least(M::slot, my.count - done);
            char* to = ring.room(rows * M::bytes, hurry);
            #pragma unroll 1
            for (int r = 0; r < rows; r += together)
                ring.fetch(to + r * M::bytes, (const char*)matrix + my.start(done + r), least(together, rows - r) * M::bytes);
            ring.filled();
        }
    }

    DEVICE void fetch_cache(u64 keys, u64 values, bool hurry) {
        constexpr int bytes = D * sizeof(Weight);
        #pragma unroll 1
        for (int item = blockIdx.x; item < ITEMS; item += GRID) {
            Item my(item, shared.place);
            int first = my.first, stop = my.stop;
            long long start = my.cache() * length;
            #pragma unroll 1
            for (; first < stop; first += PLACES) {
                int size = least(PLACES, stop - first) * bytes;
                char* to = ring.room(2 * size, hurry);
                ring.fetch(to, (const char*)keys + (start + first) * bytes, size);
                ring.fetch(to + SLOT / 2, (const char*)values + (start + first) * bytes, size);
                ring.filled();
            }
        }
    }

    template <class Fc1, class Fc2> DEVICE void fetch_layers(int begin, int end) {
        constexpr int stages = 3 + Fc1::factors + Fc2::factors, all = QKV::share_bytes + PROJ::share_bytes + Fc1::share_bytes + Fc2::share_bytes;
        constexpr bool hurry = all > LONG * SLOT * stages;
        #pragma unroll 1
        for (int layer = begin; layer < end; layer++) {
            const u64* row = shared.table[layer];
            fetch<QKV>(row[0], hurry);
            fetch_cache(row[6], row[7], hurry);
            fetch<PROJ>(row[1], hurry);
            fetch<typename Fc1::First>(row[2], hurry);
            if constexpr (Fc1::factors == 2) fetch<typename Fc1::Last>(row[3], hurry);
            fetch<typename Fc2::First>(row[4], hurry);
            if constexpr (Fc2::factors == 2) fetch<typename Fc2::Last>(row[5], hurry);
        }
    }

    // ---- Words

    DEVICE unsigned tag_of_layer(int layer) { return launch % 2 * 2 + layer % 2; }

    DEVICE void stage_done() {
        if (threadIdx.x == 0) count(stages);
        target += GRID;
    }

    DEVICE void await() {  // until the words should be there: to ask for them all the time would be in the way of those that write them
        if (threadIdx.x == 0)
            while ((int)(counted(stages) - target) < -EARLY) pause();
        sync();
    }

    DEVICE float receive(Word last, const Word* from) {  // one, read before as `last`
        while (tag_of(last) != tag) pause(), last = read(from);
        return value_of(last);
    }

    // n pieces of E words, all asked for at once: piece c, if needed(c), that begins at where(c)
    template <int n, class Needed, class Where> DEVICE void receive(float (&out)[n][E], Needed needed, Where where) {
        for (bool all = false; !all;) {
            all = true;
            #pragma unroll
            for (int c = 0; c < n; c++)
                if (needed(c)) {
                    const Word* from = where(c);
                    #pragma unroll
                    for (int e = 0; e < E; e += 4) {
                        Word words[4];
                        read_four(words, from + e / 4 * 128);
                        #pragma unroll
                        for (int i = 0; i < 4; i++) {
                            out[c][e + i] = value_of(words[i]);
                            all &= tag_of(words[i]) == tag;
                        }
                    }
                }
            if (!all) pause();
        }
    }

    // ---- A linear

    // Each warp's share of the sums over every sequence's row and over its squares; a thread has `count` of n pieces
    template <int n> DEVICE void add_up(const float (*rows)[E], int count) {
        constexpr int all = 2 * power_of_two(BATCH);
        float sums[all];
        #pragma unroll
        for (int i = 0; i < all; i++) sums[i] = 0;
        #pragma unroll
        for (int b = 0; b < BATCH; b++)
            #pragma unroll
            for (int c = 0; c < n; c++)
                if (c < count) {
                    #pragma unroll
                    for (int e = 0; e < E; e++) sums[2 * b] += rows[b * n + c][e];
                    sums[2 * b + 1] += dot(rows[b * n + c], rows[b * n + c]);
                }
        float sum = sums_over_warp<all>(sums);
        int lane = threadIdx.x % 32;
        if (lane % (32 / all) == 0) shared.moments[threadIdx.x / 32][lane * all / 32] = sum;
    }

    // W norm(x) from W (gain x) = sum and W gain, after the sync that follows add_up; W shift is in the bias. In one pass: float32 has digits
    // to spare as long as a row's mean is not a hundred deviations from zero.
    DEVICE float normed(float sum, float of_gain, int b) {
        float mean = 0, square = 0;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) mean += shared.moments[w][2 * b], square += shared.moments[w][2 * b + 1];
        mean = RMS ? 0 : mean / N;
        return (sum - mean * of_gain) * rsqrtf(fmaxf(square / N - mean * mean, 0) + eps);
    }

    // a = attention's output, pieces k, k + apart, ... of every sequence: its parts, n at a time, each with the logarithm of its softmax's denominator
    template <class M, int n> DEVICE void join(float (&a)[BATCH * M::each][E], int parts, int k, int apart, int count) {
        constexpr int pieces = BATCH * M::each;
        float top[pieces], sum[pieces];
        #pragma unroll
        for (int p = 0; p < pieces; p++) {
            top[p] = -1e30f, sum[p] = 0;
            #pragma unroll
            for (int e = 0; e < E; e++) a[p][e] = 0;
        }
        #pragma unroll 1
        for (int first = 0; first < parts; first += n) {
            float in[pieces * n][E], each[n];
            Word words[pieces * n];
            auto needed = [&](int i) { return i / n % M::each < count; };
            auto at = [&](int i) { return (first + i % n) * BATCH + i / n / M::each; };  // part and sequence
            auto logarithm = [&](int i) { return lse_copy(blockIdx.x) + at(i) * HEADS + (k + i / n % M::each * apart) / D; };
            #pragma unroll
            for (int i = 0; i < pieces * n; i++)
                if (needed(i)) words[i] = read(logarithm(i));
            receive(in, needed, [&](int i) { return part + at(i) * row_of(HEADS * D) + place_of(k) + i / n % M::each * apart; });
            #pragma unroll
            for (int p = 0; p < pieces; p++)
                if (needed(p * n)) {
                    float before = top[p];
                    #pragma unroll
                    for (int s = 0; s < n; s++) {
                        each[s] = receive(words[p * n + s], logarithm(p * n + s));
                        top[p] = fmaxf(top[p], each[s]);
                    }
                    float fade = __expf(before - top[p]);
                    sum[p] *= fade;
                    #pragma unroll
                    for (int e = 0; e < E; e++) a[p][e] *= fade;
                    #pragma unroll
                    for (int s = 0; s < n; s++) {
                        float weight = __expf(each[s] - top[p]);
                        sum[p] += weight;
                        #pragma unroll
                        for (int e = 0; e < E; e++) a[p][e] += weight * in[p * n + s][e];
                    }
                }
        }
        #pragma unroll
        for (int p = 0; p < pieces; p++)
            #pragma unroll
            for (int e = 0; e < E; e++) a[p][e] /= sum[p];
    }

    // a = pieces of every sequence's row, a sum of ADDENDS. Groups share them: each is asked for by one thread and comes to the others by way of `room`.
    template <class M, int ADDENDS> DEVICE void gather(float (&a)[BATCH * M::each][E], const Word* from, int block, float* room) {
        constexpr int pieces = BATCH * M::pieces, each = (pieces + THREADS - 1) / THREADS, size = M::K * M::blocks, stride = row_of(size * ADDENDS);
        float in[each * ADDENDS][E];
        receive(in, [&](int i) { return i / ADDENDS * THREADS + threadIdx.x < pieces; },
            [&](int i) {
                int piece = i / ADDENDS * THREADS + threadIdx.x;
                return from + piece / M::pieces * stride + place_of(i % ADDENDS * size + block * M::K + piece % M::pieces * E);
            });
        #pragma unroll
        for (int p = 0; p < each; p++)
            if (p * THREADS + threadIdx.x < pieces)
                #pragma unroll
                for (int e = 0; e < E; e++) {
                    float sum = 0;
                    #pragma unroll
                    for (int n = 0; n < ADDENDS; n++) sum += in[p * ADDENDS + n][e];
                    room[(p * THREADS + threadIdx.x) * E + e] = sum;
                }
        sync();
        #pragma unroll
        for (int b = 0; b < BATCH; b++)
            if (M::has(0)) load(a[b], room + (b * M::pieces + threadIdx.x % M::group) * E);
    }

    // What this thread multiplies with: pieces member, member + group, ... of a block of every sequence's row of `from`, which is a sum of ADDENDS
    template <class M, Input IN, int ADDENDS> DEVICE void input(float (&a)[BATCH * M::each][E], const Word* from, const float* gains, int block) {
        constexpr bool whole = M::groups == 1 && M::blocks == 1;                       // the threads of the group together have the row
        constexpr int apart = M::group * E, pieces = BATCH * M::each, size = M::K * M::blocks, terms = IN == GATED ? 2 : ADDENDS, stride = row_of(size * terms);
        constexpr int row = IN == NORMED && !whole ? (N / E + THREADS - 1) / THREADS : 0, more = IN == NORMED ? row : M::each * (terms - 1);
        int member = threadIdx.x % M::group, k = block * M::K + member * E;
        int count = M::pieces % M::group == 0 ? M::each : (M::pieces - member + M::group - 1) / M::group;
        int rest = N / E % THREADS == 0 ? row : (N / E - (int)threadIdx.x + THREADS - 1) / THREADS;
        float in[pieces + BATCH * more][E], gain[M::each][E];
        #pragma unroll
        for (int c = 0; c < M::each; c++)
            if (IN == NORMED && c < count) load(gain[c], gains + k + c * apart);
        await();
        if constexpr (IN == PLAIN && BATCH > 1 && M::groups > 1 && BATCH * M::K <= THREADS * WARPS)
            return gather<M, ADDENDS>(a, from, block, shared.partial[turn ^ 1]);  // which the stage before this one is done with
        if constexpr (IN == PARTS) {
            constexpr int n = least(SPLITS, most(1, 2 / pieces));  // at a time; more were slower
            int parts = 1;
            #pragma unroll
            for (int b = 0; b < BATCH; b++) parts = most(parts, parts_of(shared.place[b]));
            if (parts > 1) return join<M, n>(a, parts, k, apart, count);
            return receive(a, [&](int i) { return i % M::each < count; },
                [&](int i) { return part + i / M::each * row_of(HEADS * D) + place_of(k) + i % M::each * apart; });
        }
        receive(in, [&](int i) { return i < pieces || IN != NORMED ? i % M::each < count : (i - pieces) % most(1, row) < rest; },
            [&](int i) {
                int j = i - pieces;
                if (i < pieces) return from + i / M::each * stride + place_of(k) + i % M::each * apart;  // of whole spans
                if (IN != NORMED) return from + j / M::each % BATCH * stride + place_of((j / pieces + 1) * size + k) + j % M::each * apart;
                return from + j / most(1, row) * stride + place_of(threadIdx.x * E) + j % most(1, row) * THREADS * E;
            });
        if constexpr (IN == NORMED && whole) add_up<M::each>(in, threadIdx.x < M::group ? count : 0);
        if constexpr (IN == NORMED && !whole) add_up<row>(in + pieces, rest);
        #pragma unroll
        for (int i = 0; i < pieces; i++)
            #pragma unroll
            for (int e = 0; e < E; e++) {
                a[i][e] = in[i][e];
                #pragma unroll
                for (int n = 1; n < ADDENDS; n++) a[i][e] += in[n * pieces + i][e];
                if constexpr (IN == NORMED) a[i][e] *= gain[i % M::each][e];
                if constexpr (IN == GATED) a[i][e] = a[i][e] / (1 + __expf(-a[i][e])) * in[pieces + i][e];
            }
    }

    // this thread's pieces of a slot, or, without a branch, of what lies near where it has none
    template <class M> DEVICE void load_pieces(uint4 (&w)[M::rows * M::each]) {
        int first = threadIdx.x / M::group * M::pieces + threadIdx.x % M::group;
        #pragma unroll
        for (int i = 0; i < M::rows * M::each; i++) {
            int piece = first + i / M::each * M::groups * M::pieces + i % M::each * M::group;
            w[i] = ring.data()[M::even ? piece : least(piece, SLOT / 16 - 1)];
        }
    }

    // partial[warp][row][sequence] = this warp's share of the next `count` rows times a. What the next slot holds is loaded before this one's is
    // multiplied with, so that neither this nor the sums wait for it; what is loaded behind the last one is not used.
    template <class M> DEVICE void multiply(float* partial, const float (&a)[BATCH * M::each][E], int count) {
        constexpr int n = power_of_two(M::several * M::rows), all = n * power_of_two(BATCH);
        int group = threadIdx.x / M::group, member = threadIdx.x % M::group, lane = threadIdx.x % 32;
        int b = lane * all / 32 / n, i = lane * all / 32 % n;  // whose sum this lane gets
        bool tells = lane % (32 / all) == 0 && b < BATCH && i < M::several * M::rows && M::in_group();
        partial += member / 32 * THREADS + (i / M::rows * M::slot + i % M::rows * M::groups + group) * BATCH + b;
        constexpr int ahead = BATCH <= 2;  // else registers are short
        uint4 now[M::rows * M::each], next[M::rows * M::each];
        if (ahead) ring.wait(), load_pieces<M>(now), ring.give_back();  // at once: loads are quicker than a copy
        #pragma unroll 1
        for (int done = 0; done < count; done += M::several * M::slot) {
            float sums[all];
            #pragma unroll
            for (int i = 0; i < all; i++) sums[i] = 0;
            #pragma unroll
            for (int s = 0; s < M::several; s++) {
                bool more = done + (s + ahead) * M::slot < count;
                if (!ahead && !more) continue;
                if (more) ring.wait();
                load_pieces<M>(ahead ? next : now);
                #pragma unroll
                for (int i = 0; i < M::rows * M::each; i++)
                    if (M::has(i % M::each)) {
                        float w[E];
                        unpack(now[i], w);
                        #pragma unroll
                        for (int b = 0; b < BATCH; b++) sums[b * n + s * M::rows + i / M::each] += dot(w, a[b * M::each + i % M::each]);
                    }
                ring.give_back(more);
                #pragma unroll
                for (int i = 0; ahead && i < M::rows * M::each; i++) now[i] = next[i];
            }
            float sum = sums_over_warp<all>(sums);
            if (tells) partial[done * BATCH] = sum;
        }
    }

    DEVICE void put(Word* to, float value, unsigned tag) { write(to, word(value, tag)); }
    DEVICE void put(Weight* to, float value, unsigned) { narrow(value, *to); }
    DEVICE int place_in(const Word*, int b, int n, int size) { return b * row_of(size) + place_of(n); }
    DEVICE int place_in(const Weight*, int b, int n, int size) { return b * size + n; }

    // to = act(matrix input + bias) + old for every sequence, tagged `result`. norm: where the input is normed, its gain and the matrix times it
    template <class M, Input IN, bool ACTIVATE, int ADDENDS = 1, class T>
    DEVICE void linear(const Word* from, const float* norm, const float* bias, const Word* old, T* to, unsigned result) {
        M my;
        float a[BATCH * M::each][E];
        int b = threadIdx.x / M::round, row = threadIdx.x % M::round;  // whose output this thread tells
        #pragma unroll 1
        for (int begin = 0; begin < my.count; begin += M::round) {
            int count = least(M::round, my.count - begin), place = my.place(begin + row), at = place_in(to, b, place, M::all);
            bool mine = b < BATCH && row < count;
            float sum = 0, extra = bias && mine ? bias[place] : 0, of_gain = IN == NORMED && mine ? norm[N + place] : 0, *partial = shared.partial[turn ^= 1];
            if (begin == 0) input<M, IN, ADDENDS>(a, from, norm, my.block);
            Word before = old && mine ? read(old + at) : 0;
            multiply<M>(partial, a, count);
            sync();  // two rounds from now, when all are past the next sync, `partial` is written again
            if (mine) {
                #pragma unroll
                for (int w = 0; w < M::group / 32; w++) sum += partial[w * THREADS + row * BATCH + b];
                if (IN == NORMED) sum = normed(sum, of_gain, b);
                sum += extra;
                if (ACTIVATE) sum = activate(sum);
                if (old) sum += receive(before, old + at);
                put(to + at, sum, result);
            }
        }
        stage_done();
    }

    // ---- Attention

    // a team's running softmax over its part of a slot, which holds `size` places
    DEVICE void look(const uint4* slot, int size, const float (&q)[E], float (&out)[E], float& top, float& sum) {
        constexpr int teams = TEAMS / GANGS, n = PLACES / teams;
        int team = threadIdx.x / 32 / GANGS * (32 / MEMBERS) + threadIdx.x % 32 / MEMBERS, member = threadIdx.x % MEMBERS;
        float scores[n], before = top, k[E], v[E];
        #pragma unroll
        for (int j = 0; j < n; j++) {
            unpack(slot[(j * teams + team) * MEMBERS + member], k);
            scores[j] = sum_over<MEMBERS>(dot(q, k));
            if (j * teams + team < size) top = fmaxf(top, scores[j]);
        }
        float fade = __expf(before - top);
        sum *= fade;
        #pragma unroll
        for (int e = 0; e < E; e++) out[e] *= fade;
        #pragma unroll
        for (int j = 0; j < n; j++)
            if (j * teams + team < size) {
                float weight = __expf(scores[j] - top);
                unpack(slot[SLOT / 32 + (j * teams + team) * MEMBERS + member], v);
                sum += weight;
                #pragma unroll
                for (int e = 0; e < E; e++) out[e] += weight * v[e];
            }
    }

    DEVICE void attention(Weight* keys, Weight* values) {
        int member = threadIdx.x % MEMBERS, warp = threadIdx.x / 32, at = member * E;
        bool first = threadIdx.x % 32 < MEMBERS;  // team of the warp
        #pragma unroll 1
        for (int item = blockIdx.x; item < ITEMS; item += GRID) {
            Item my(item, shared.place);
            if (my.first > 0 && my.first >= my.place) {
                unused(item);
                continue;
            }
            bool with_new = my.first == 0 && warp == 1 % GANGS;  // of the gang that has the fewest slots
            float turn_by[2][E], in[5][E], out[E] = {}, top = -1e30f, sum = 0;  // in: query, key, value; the other half of query and key
            if (ROPE) load(turn_by[0], cos + my.place * D + at), load(turn_by[1], sin + my.place * D + at);
            int from[5];
            #pragma unroll
            for (int c = 0; c < 5; c++) {
                int which = c % 3 == 0 ? my.head : c % 3 == 1 ? HEADS + my.kv : HEADS + KV + my.kv;
                from[c] = my.b * row_of(QKV::all) + place_of(which * D + (c > 2 ? (at + D / 2) % D : at));
            }
            if (item == blockIdx.x) await();  // words of later ones are there by then, or nearly
            receive(in, [&](int c) { return c < 3 || ROPE; }, [&](int c) { return qkv + from[c]; });
            float (&q)[E] = in[0], (&key)[E] = in[1], (&value)[E] = in[2];
            #pragma unroll
            for (int e = 0; e < E; e++) {
                if (ROPE) q[e] = q[e] * turn_by[0][e] + in[3][e] * turn_by[1][e];  // the first half of sin is negative
                q[e] *= rsqrtf(D);
            }
            if (with_new) {  // the new token begins the running softmax of one team, so nothing just stored is read
                long long here = (my.cache() * length + my.place) * D + at;
                #pragma unroll
                for (int e = 0; e < E; e++) {
                    if (ROPE) key[e] = key[e] * turn_by[0][e] + in[4][e] * turn_by[1][e];
                    Weight k, v;
                    narrow(key[e], k), narrow(value[e], v);
                    if (first && my.head % (HEADS / KV) == 0) keys[here + e] = k, values[here + e] = v;
                    key[e] = wide(k);
                    if (first) out[e] = wide(v);
                }
                float score = sum_over<MEMBERS>(dot(q, key));
                if (first) top = score, sum = 1;
            }
            #pragma unroll 1
            for (int start = my.first, order = warp; start < my.stop; start += PLACES, order++) {
                ring.wait();
                if (order % GANGS == 0) look(ring.data(), my.stop - start, q, out, top, sum);
                ring.give_back();
            }
            #pragma unroll
            for (int o = MEMBERS; o < 32; o *= 2) {  // the teams of a warp
                float higher = fmaxf(top, shuffle(top, o)), fade = __expf(top - higher);
                top = higher, sum *= fade, sum += shuffle(sum, o);
                #pragma unroll
                for (int e = 0; e < E; e++) out[e] *= fade, out[e] += shuffle(out[e], o);
            }
            if (item != blockIdx.x) sync();  // the item before this one is done
            if (first) {
                #pragma unroll
                for (int e = 0; e < E; e++) shared.heads[warp][at + e] = out[e];
                shared.largest[warp] = top, shared.sums[warp] = sum;
            }
            sync();
            finish(item);
        }
        stage_done();
    }

    DEVICE Word* lse_copy(int i) { return lse + i % COPIES * ITEMS; }
    DEVICE Word* part_of(int item, int d) { return part + item / HEADS * row_of(HEADS * D) + place_of(item % HEADS * D + d); }

    // part, lse: what the warps found
    DEVICE void finish(int item) {
        float top = -1e30f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.largest[w]);
        #pragma unroll 1
        for (int d = threadIdx.x; d < D; d += THREADS) {
            float sum = 0, out = 0;
            #pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float fade = __expf(shared.largest[w] - top);
                sum += fade * shared.sums[w], out += fade * shared.heads[w][d];
            }
            put(part_of(item, d), out / sum, tag);
            if (d < COPIES) put(lse_copy(d) + item, top + __logf(sum), tag);
        }
    }

    DEVICE void unused(int item) {  // a part of no weight: some of these are read, and tags must not grow old
        #pragma unroll 1
        for (int d = threadIdx.x; d < D; d += THREADS) put(part_of(item, d), 0, tag);
        if (threadIdx.x < COPIES) put(lse_copy(threadIdx.x) + item, -1e30f, tag);
    }

    // ---- The step

    // bias: of the first matrix where its input is normed, of the last one behind it
    template <class F, Input IN, bool ACTIVATE>
    DEVICE void ffn_linear(const Word* from, const float* norm, const float* bias, Word* rank, const Word* old, Word* to, unsigned result) {
        typedef typename F::First First;
        typedef typename F::Last Last;
        if constexpr (F::factors == 2) {
            linear<First, IN, false>(from, norm, IN == NORMED ? bias : nullptr, nullptr, rank, tag);
            linear<Last, PLAIN, ACTIVATE, First::addends>(rank, nullptr, IN == NORMED ? bias + First::all : bias, old, to, result);
        } else
            linear<First, IN, ACTIVATE>(from, norm, bias, old, to, result);
    }

    template <class Fc1, class Fc2> DEVICE void compute_layers(int begin, int end) {
        typedef typename Fc1::First First;
        #pragma unroll 1
        for (int layer = begin; layer < end; layer++) {
            const float *norm1 = (const float*)shared.table[layer][8], *qkv_bias = norm1 + N + QKV::all, *proj_bias = qkv_bias + QKV::all, *norm2 = proj_bias + N,
                        *bias1 = norm2 + N + First::all, *bias2 = bias1 + First::all + (Fc1::factors == 2 ? Fc1::Last::all : 0);
            linear<QKV, NORMED, false>(x, norm1, qkv_bias, nullptr, qkv, tag);
            attention((Weight*)shared.table[layer][6], (Weight*)shared.table[layer][7]);
            linear<PROJ, PARTS, false>(nullptr, nullptr, proj_bias, x, y, tag);
            ffn_linear<Fc1, NORMED, true>(y, norm2, bias1, rank1, nullptr, hidden, tag);
            ffn_linear<Fc2, ACT == SWIGLU ? GATED : PLAIN, false>(hidden, nullptr, bias2, rank2, y, x, tag_of_layer(layer + 1));
            tag = tag_of_layer(layer + 1);
        }
    }

    template <class Fc1, class Fc2> DEVICE void layers(bool fetching, int begin, int end) {
        if (fetching)
            fetch_layers<Fc1, Fc2>(begin, end);
        else
            compute_layers<Fc1, Fc2>(begin, end);
    }

    DEVICE void embed() {
        PROJ my;
        #pragma unroll 1
        for (int i = threadIdx.x; i < my.count * BATCH; i += THREADS) {
            int b = i % BATCH, n = my.place(i / BATCH);
            put(x + place_in(x, b, n, N), wide(wte[token[b] * N + n]) + (wpe ? wide(wpe[(long long)shared.place[b] * N + n]) : 0), tag);
        }
        stage_done();
    }

    DEVICE void fetch_all() {
        LAYERS_OF(true)
        fetch<HEAD>((u64)head, true);
    }

    DEVICE void compute_all() {
        if (threadIdx.x == 0) arrive(counter);  // having read how many did before, and the position
        embed();
        LAYERS_OF(false)
        linear<HEAD, NORMED, false>(x, head_norm, head_norm + N + HEAD::all, nullptr, logits, 0);
        if (blockIdx.x == 0 && threadIdx.x < BATCH) {
            while (arrivals(counter) < (launch + 1) * GRID) pause();  // until all have read the positions
            position[threadIdx.x] = least(shared.place[threadIdx.x] + 1, length - 1);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) decode_step(Arguments arguments) {
    Shared& shared = *(Shared*)shared_memory();
    constexpr int before = (sizeof(Shared) + 127) / 128 * 128;
    int slots = least(MOST_SLOTS, (shared_bytes() - before) / SLOT);
    if (threadIdx.x < slots) {
        barrier_init(shared.full + threadIdx.x, 1);
        barrier_init(shared.empty + threadIdx.x, WARPS);
    }
    if (threadIdx.x < BATCH) shared.place[threadIdx.x] = arguments.position[threadIdx.x];
    for (int i = threadIdx.x; i < LAYERS * 9; i += blockDim.x) shared.table[i / 9][i % 9] = arguments.table[i];
    Program program(arguments, shared, Ring{shared, shared_memory() + before, slots});
    __syncthreads();
    if (threadIdx.x < THREADS) {
        more_registers();
        program.compute_all();
    } else {
        fewer_registers();
        if (threadIdx.x == THREADS) program.fetch_all();
    }
}
