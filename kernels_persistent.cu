// A decoding step of one sequence as one kernel that stays on the GPU from the embedding to the logits.
//
// At batch 1 a step reads every weight once and computes next to nothing: what counts is that memory never idles. Each multiprocessor
// runs one program: one warp that fetches and WARPS that compute. All matrices are cut into shares of rows, one share a program, which
// lie in one piece in memory. The fetching warp asks the copy engine for its program's shares, and its part of the KV cache, in the
// order in which they will be used, as long as a ring of slots in shared memory has room: half a layer ahead. What others compute never
// holds it up. The computing warps go from stage to stage (qkv, attention, proj, and one for each factor of the FFN). What a stage finds
// goes to the others as words in global memory: a float32 and the number of the layer that it belongs to, stored as one. Who needs a
// word reads it until that number is right; there are no barriers.
//
// No word is overwritten before all have read it: a word's next writer has, by way of the stages between, waited for all words of qkv's
// input, so for all programs to have done the layer before.
//
// The host sets as macros: Weight (bf16 or float), GRID, WARPS, SLOT (bytes), N, HEADS, KV, D, LAYERS, SPLITS, ROPE, RMS, ACT, QKV, PROJ,
// HEAD (matrices), LAYERS_OF (calls of `layers`, one for each run of layers of one kind).

struct bf16 { unsigned short bits; };
enum Activation { NONE, GELU, RELU2, SWIGLU };
enum Input { PLAIN, NORMED, PARTS, GATED };
typedef unsigned long long u64;
typedef u64 Word;                        // of an activation: a float, and above it the layer that it belongs to

constexpr int THREADS = 32 * WARPS;      // that compute
constexpr int E = 16 / sizeof(Weight);   // weights in a piece: 16 bytes, what a thread loads at a time
constexpr int MOST_SLOTS = 32;
constexpr int FLIGHT = 1;                // slots asked for and not there yet: more would queue before the memory, and activations behind them
constexpr int REACH = 64;                // places of the cache below which a head is not shared by programs


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
DEVICE void count_done(u64* stages) { asm volatile("red.relaxed.gpu.global.add.u64 [%0], 1;" :: "l"(stages)); }
DEVICE void write(Word* to, Word word) { asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" :: "l"(to), "l"(word)); }
DEVICE Word read(const Word* from) {
    Word word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from));
    return word;
}
DEVICE void read_two(Word& first, Word& second, const Word* from) {  // of 16 aligned bytes
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(from));
}
DEVICE void pause() {}
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
    out.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

DEVICE void load(float (&out)[E], const float* from) {
    #pragma unroll
    for (int i = 0; i < E; i += 4) {
        float4 four = *(const float4*)(from + i);
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
}

DEVICE Word word(float value, unsigned number) { return (Word)number << 32 | __float_as_uint(value); }
DEVICE float value_of(Word word) { return __uint_as_float((unsigned)word); }
DEVICE unsigned number_of(Word word) { return word >> 32; }

DEVICE float dot(const float (&a)[E], const float (&b)[E]) {
    float sum = 0;
    #pragma unroll
    for (int i = 0; i < E; i++) sum += a[i] * b[i];
    return sum;
}

DEVICE float activate(float a) {
    if (ACT == RELU2) return a > 0 ? a * a : 0;
    if (ACT == GELU) return a / (1 + __expf(-1.5957691216f * (a + 0.044715f * a * a * a)));  // tanh-GELU is a sigmoid(u)
    return a;
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

// BLOCKS blocks of ROWS x COLS, one below the other; block b maps entries b COLS to (b + 1) COLS. Row j's output goes to place
// j % SPREAD * (all rows / SPREAD) + j / SPREAD. A program has some neighbouring rows of one block, whose columns its threads share.
template <int ROWS, int COLS, int BLOCKS = 1, int SPREAD = ROWS * BLOCKS>
struct Matrix {
    static constexpr int all = ROWS * BLOCKS, K = COLS, blocks = BLOCKS, bytes = COLS * sizeof(Weight);
    static constexpr int pieces = K / E;                                                 // of a row
    static constexpr int group = least((pieces + 31) / 32 * 32, THREADS);                // threads that share a row, whole warps
    static constexpr int groups = THREADS / group;
    static constexpr int each = (pieces + group - 1) / group;                            // pieces of a row for each thread
    static constexpr int rows = most(1, least(SLOT / bytes / groups, 32));               // of a slot for each group
    static constexpr int slot = rows * groups;                                           // rows in a slot
    static constexpr int share = (ROWS + GRID / BLOCKS - 1) / (GRID / BLOCKS);           // rows of a program at most
    static constexpr int batch = least(32 / rows, (share + slot - 1) / slot);            // slots whose sums are found together
    static constexpr int round = THREADS / (slot * batch) * slot * batch;       // rows between two looks at the sums
    static_assert(slot * bytes <= SLOT && round <= THREADS && COLS % E == 0 && BLOCKS <= GRID, "the host plans for this");

    int block, first, count;                                                             // of this program: first of all rows
    DEVICE Matrix() {
        constexpr int programs = GRID / BLOCKS;                                          // of a block
        int i = blockIdx.x % programs, begin = ROWS * i / programs;
        bool idle = blockIdx.x >= programs * BLOCKS;
        block = idle ? 0 : blockIdx.x / programs;
        first = block * ROWS + begin;
        count = idle ? 0 : ROWS * (i + 1) / programs - begin;
    }
    DEVICE int place(int row) const { return (first + row) % SPREAD * (all / SPREAD) + (first + row) / SPREAD; }
};

template <class A> struct Dense { typedef A First; typedef A Last; static constexpr bool factors = false; };
template <class A, class B> struct Factors { typedef A First; typedef B Last; static constexpr bool factors = true; };

constexpr int MEMBERS = D / E;                     // threads that share a place of the cache, a team
constexpr int TEAMS = THREADS / MEMBERS;
constexpr int PLACES = SLOT / 2 / (16 * MEMBERS);  // in a slot: keys in its first half, values in its second
static_assert(PLACES % TEAMS == 0 && 32 % MEMBERS == 0, "the host plans for this");

struct Shared {
    u64 full[MOST_SLOTS], empty[MOST_SLOTS];       // barriers of the ring
    u64 table[LAYERS][8];
    float partial[2][THREADS * WARPS];             // sums of a row by warp, in turn
    float total[2][WARPS];
    float heads[WARPS][D + 2];                     // of each warp's part of the cache: output, largest score, denominator
};

struct Ring {
    Shared& shared;
    char* memory;
    int slots, slot = 0, phase = 0, asked = 0, late = 0, late_phase = 0;

    DEVICE void next(int& slot, int& phase) {
        if (++slot == slots) slot = 0, phase ^= 1;
    }
    // the fetching thread
    DEVICE char* room(int bytes) {
        barrier_wait(shared.empty + slot, phase ^ 1);
        if (++asked > least(FLIGHT, slots)) {
            barrier_wait(shared.full + late, late_phase);
            next(late, late_phase);
        }
        barrier_expect(shared.full + slot, bytes);
        return memory + slot * SLOT;
    }
    DEVICE void fetch(char* to, const char* from, int bytes) { copy_async(to, from, bytes, shared.full + slot); }
    DEVICE void filled() { next(slot, phase); }
    // the computing threads
    DEVICE const uint4* take() {
        barrier_wait(shared.full + slot, phase);
        return (const uint4*)(memory + slot * SLOT);
    }
    DEVICE void give_back() {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.empty + slot);
        next(slot, phase);
    }
};


// ---------------------------------------------------------------------------------------------------------------------
// A program. table[layer]: addresses of qkv, proj, fc1's V and U, fc2's V and U (where there is one matrix, it stands twice), keys and values.
// vectors: norms and biases, layer by layer: norm1, qkv, proj, norm2, fc1, fc2; a norm is its gain and its shift.

struct Arguments {
    const long long* token;
    long long* position;
    const Weight *wte, *wpe, *head;
    const float *cos, *sin;
    const u64* table;
    const float* vectors;
    Word *x, *y, *qkv, *part, *lse, *rank1, *rank2, *hidden;  // x: what a layer begins with; y: with attention added
    Weight* logits;
    u64* counter;                                             // of programs that began, in all launches; behind it, of stages done: a hint when to look
    long long length;
    float eps;
};

struct Program : Arguments {
    Shared& shared;
    Ring ring;
    u64 launch;
    int place, reach, active;      // tokens in the cache; places for each of the `active` programs that share a head
    unsigned number;               // of the words that this layer begins with; those that it writes have the next one
    int turn = 0;
    u64 target = 0;                // of stages done

    DEVICE Program(const Arguments& arguments, Shared& shared, Ring ring) : Arguments(arguments), shared(shared), ring(ring) {
        launch = arrivals(counter) / GRID;  // all programs of this launch begin before one of the next does
        number = launch * (LAYERS + 1) + 1;
        target = launch * STAGES * GRID;
        place = *position;
        reach = most(REACH, (place + SPLITS - 1) / SPLITS);
        active = most(1, (place + reach - 1) / reach);
    }

    // ---- The fetching thread

    template <class M> DEVICE void fetch(u64 matrix) {
        M my;
        const char* from = (const char*)matrix + (long long)my.first * M::bytes;
        for (int begin = 0; begin < my.count; begin += M::round)
            for (int done = begin; done < least(begin + M::round, my.count); done += M::slot) {
                int bytes = least(M::slot, my.count - done) * M::bytes;
                ring.fetch(ring.room(bytes), from + (long long)done * M::bytes, bytes);
                ring.filled();
            }
    }

    DEVICE void fetch_cache(u64 keys, u64 values) {
        constexpr int bytes = D * sizeof(Weight);
        for (int item = blockIdx.x; item < HEADS * active; item += GRID) {
            int first = item / HEADS * reach, stop = least(first + reach, place);
            long long start = item % HEADS / (HEADS / KV) * length;
            for (; first < stop; first += PLACES) {
                int size = least(PLACES, stop - first) * bytes;
                char* to = ring.room(2 * size);
                ring.fetch(to, (const char*)keys + (start + first) * bytes, size);
                ring.fetch(to + SLOT / 2, (const char*)values + (start + first) * bytes, size);
                ring.filled();
            }
        }
    }

    template <class Fc1, class Fc2> DEVICE void fetch_layers(int begin, int end) {
        for (int layer = begin; layer < end; layer++) {
            const u64* row = shared.table[layer];
            fetch<QKV>(row[0]);
            fetch_cache(row[6], row[7]);
            fetch<PROJ>(row[1]);
            fetch<typename Fc1::First>(row[2]);
            if (Fc1::factors) fetch<typename Fc1::Last>(row[3]);
            fetch<typename Fc2::First>(row[4]);
            if (Fc2::factors) fetch<typename Fc2::Last>(row[5]);
        }
    }

    // ---- Words

    DEVICE void stage_done() {
        sync();
        if (threadIdx.x == 0) count_done(counter + 1);
        target += GRID;
    }

    DEVICE void await() {  // until the words should be there: asking for them all the time would be in the way of those that write them
        if (threadIdx.x == 0)
            while (read(counter + 1) < target) pause();
        sync();
    }

    DEVICE float receive(Word last, const Word* from, unsigned number) {  // one, read before as `last`
        while (number_of(last) != number) pause(), last = read(from);
        return value_of(last);
    }

    // `count` of n pieces of E words, `apart` words apart
    template <int n> DEVICE void receive(float (&out)[n][E], const Word* from, int apart, int count, unsigned number) {
        for (bool all = false; !all;) {
            const Word* missing = from;
            all = true;
            #pragma unroll
            for (int c = 0; c < n; c++)
                if (c < count)
                    #pragma unroll
                    for (int e = 0; e < E; e += 2) {
                        Word a, b;
                        read_two(a, b, from + c * apart + e);
                        out[c][e] = value_of(a), out[c][e + 1] = value_of(b);
                        if (number_of(a) != number || number_of(b) != number) all = false, missing = from + c * apart + e;
                    }
            if (!all) pause();
            if (n > 1 && !all)  // all pieces again and again would be in the way of those that write them
                while (number_of(read(missing)) != number) pause();
        }
    }

    // ---- A linear

    DEVICE float total(float value, int which) {  // over all threads
        value = sum_over<32>(value);
        if (threadIdx.x % 32 == 0) shared.total[which][threadIdx.x / 32] = value;
        sync();
        value = 0;
        #pragma unroll
        for (int i = 0; i < WARPS; i++) value += shared.total[which][i];
        return value;
    }

    // mean and 1 / deviation of a row, of which each thread has `count` of n pieces
    template <int n> DEVICE void statistics(const float (&row)[n][E], int count, float& mean, float& scale) {
        float sum = 0, squares = 0;
        #pragma unroll
        for (int c = 0; c < n; c++)
            #pragma unroll
            for (int e = 0; e < E; e++) sum += c < count ? row[c][e] : 0;
        mean = RMS ? 0 : total(sum, 0) / N;
        #pragma unroll
        for (int c = 0; c < n; c++)
            #pragma unroll
            for (int e = 0; e < E; e++) squares += c < count ? (row[c][e] - mean) * (row[c][e] - mean) : 0;
        scale = rsqrtf(total(squares, 1) / N + eps);
    }

    // a = entries k to k + E of attention's output: its parts, each with the logarithm of its softmax's denominator
    DEVICE void join(float (&a)[E], int k, unsigned number) {
        constexpr int n = least(4, SPLITS);
        float top = -1e30f, sum = 0;
        #pragma unroll
        for (int e = 0; e < E; e++) a[e] = 0;
        for (int first = 0; first < active; first += n) {
            float parts[n][E];
            Word each[n];
            const Word* from = lse + first * HEADS + k / D;
            #pragma unroll
            for (int s = 0; s < n; s++)
                if (first + s < active) each[s] = read(from + s * HEADS);
            receive(parts, part + first * HEADS * D + k, HEADS * D, active - first, number);
            #pragma unroll
            for (int s = 0; s < n; s++)
                if (first + s < active) {
                    float mine = receive(each[s], from + s * HEADS, number), higher = fmaxf(top, mine);
                    float weight = __expf(mine - higher), fade = __expf(top - higher);
                    sum = sum * fade + weight, top = higher;
                    #pragma unroll
                    for (int e = 0; e < E; e++) a[e] = a[e] * fade + weight * parts[s][e];
                }
        }
        #pragma unroll
        for (int e = 0; e < E; e++) a[e] /= sum;
    }

    // What this thread multiplies with: pieces member, member + group, ... of a block of `from`
    template <class M, Input IN> DEVICE void input(float (&a)[M::each][E], const Word* from, unsigned number, const float* norm, int block) {
        constexpr int apart = M::group * E;
        int member = threadIdx.x % M::group, k = block * M::K + member * E;
        int count = M::pieces % M::group == 0 ? M::each : (M::pieces - member + M::group - 1) / M::group;
        float gain[M::each][E], shift[M::each][E];
        #pragma unroll
        for (int c = 0; c < M::each; c++)
            if (IN == NORMED && c < count) {
                load(gain[c], norm + k + c * apart);
                load(shift[c], norm + N + k + c * apart);
            }
        await();
        if constexpr (IN == PARTS) {
            #pragma unroll
            for (int c = 0; c < M::each; c++)
                if (c < count) join(a[c], k + c * apart, number);
        } else
            receive(a, from + k, apart, count, number);
        if constexpr (IN == GATED) {
            float value[M::each][E];
            receive(value, from + M::K * M::blocks + k, apart, count, number);
            #pragma unroll
            for (int c = 0; c < M::each; c++)
                #pragma unroll
                for (int e = 0; e < E; e++) a[c][e] = a[c][e] / (1 + __expf(-a[c][e])) * value[c][e];
        }
        if constexpr (IN == NORMED) {
            float mean, scale;
            if constexpr (M::groups == 1 && M::blocks == 1)
                statistics(a, count, mean, scale);
            else {
                float row[(N / E + THREADS - 1) / THREADS][E];
                int pieces = (N / E - (int)threadIdx.x + THREADS - 1) / THREADS;
                receive(row, from + threadIdx.x * E, THREADS * E, pieces, number);
                statistics(row, pieces, mean, scale);
            }
            #pragma unroll
            for (int c = 0; c < M::each; c++)
                #pragma unroll
                for (int e = 0; e < E; e++) a[c][e] = (a[c][e] - mean) * scale * gain[c][e] + shift[c][e];
        }
    }

    // partial[row][warp] = this warp's share of the rows in the next `batch` slots times a
    template <class M> DEVICE void multiply(float* partial, const float (&a)[M::each][E], int done, int count) {
        constexpr int n = power_of_two(M::batch * M::rows), warps = M::group / 32;
        int group = threadIdx.x / M::group, member = threadIdx.x % M::group, lane = threadIdx.x % 32;
        float sums[n];
        #pragma unroll
        for (int i = 0; i < n; i++) sums[i] = 0;
        #pragma unroll
        for (int s = 0; s < M::batch; s++)
            if (done + s * M::slot < count) {
                const uint4* slot = ring.take() + group * M::pieces + member;
                #pragma unroll
                for (int r = 0; r < M::rows; r++)
                    #pragma unroll
                    for (int c = 0; c < M::each; c++)
                        if (group < M::groups && (M::pieces % M::group == 0 || c * M::group + member < M::pieces)) {
                            float w[E];
                            unpack(slot[r * M::groups * M::pieces + c * M::group], w);
                            sums[s * M::rows + r] += dot(w, a[c]);
                        }
                ring.give_back();
            }
        float sum = sums_over_warp<n>(sums);
        int i = lane * n / 32, row = done + i / M::rows * M::slot + i % M::rows * M::groups + group;
        if (lane % (32 / n) == 0 && i < M::batch * M::rows && group < M::groups && row < count) partial[row * warps + member / 32] = sum;
    }

    DEVICE void put(Word* to, float value, unsigned number) { write(to, word(value, number)); }
    DEVICE void put(Weight* to, float value, unsigned) { narrow(value, *to); }

    // to = act(matrix input + bias) + old, as words of number `result`; input, of number `given`, from `from`; old of number `then`
    template <class M, Input IN, bool ACTIVATE, class T>
    DEVICE void linear(const Word* from, unsigned given, const float* norm, const float* bias, const Word* old, unsigned then, T* to, unsigned result) {
        constexpr int warps = M::group / 32;
        M my;
        float a[M::each][E];
        for (int begin = 0; begin < my.count; begin += M::round) {
            int count = least(M::round, my.count - begin), at = my.place(begin + threadIdx.x);
            bool mine = threadIdx.x < count;
            float extra = bias && mine ? bias[at] : 0, *partial = shared.partial[turn ^= 1];
            if (begin == 0) input<M, IN>(a, from, given, norm, my.block);
            Word before = old && mine ? read(old + at) : 0;
            for (int done = 0; done < count; done += M::batch * M::slot) multiply<M>(partial, a, done, count);
            sync();  // two rounds from now, when all are past the next sync, `partial` is written again
            if (mine) {
                #pragma unroll
                for (int w = 0; w < warps; w++) extra += partial[threadIdx.x * warps + w];
                if (ACTIVATE) extra = activate(extra);
                if (old) extra += receive(before, old + at, then);
                put(to + at, extra, result);
            }
        }
        stage_done();
    }

    // ---- Attention: an item is a query head and `reach` places of the cache

    // entries `at` to at + E of a head's query or key, turned by its position
    DEVICE void turned(float (&out)[1][E], const Word* vector, int at) {
        receive(out, vector + at, 0, 1, number + 1);
        if (ROPE) {
            float other[1][E];
            receive(other, vector + (at + D / 2) % D, 0, 1, number + 1);
            #pragma unroll
            for (int e = 0; e < E; e++)  // the first half of sin is negative
                out[0][e] = out[0][e] * cos[place * D + at + e] + other[0][e] * sin[place * D + at + e];
        }
    }

    DEVICE void attention(Weight* keys, Weight* values) {
        int member = threadIdx.x % MEMBERS, team = threadIdx.x / MEMBERS, warp = threadIdx.x / 32, at = member * E;
        await();
        for (int item = blockIdx.x; item < HEADS * active; item += GRID) {
            int head = item % HEADS, split = item / HEADS, kv = head / (HEADS / KV);
            int first = split * reach, stop = least(first + reach, place);
            float q[1][E], key[1][E], value[1][E], out[E];
            turned(q, qkv + head * D, at);
            turned(key, qkv + (HEADS + kv) * D, at);
            receive(value, qkv + (HEADS + KV + kv) * D + at, 0, 1, number + 1);
            bool own = split == 0 && team == 0;  // the new token begins the running softmax of one team, so nothing just stored is read
            long long here = ((long long)kv * length + place) * D + at;
            #pragma unroll
            for (int e = 0; e < E; e++) {
                Weight k, v;
                narrow(key[0][e], k), narrow(value[0][e], v);
                if (own && head % (HEADS / KV) == 0) keys[here + e] = k, values[here + e] = v;
                q[0][e] *= rsqrtf(D), key[0][e] = wide(k);
                out[e] = own ? wide(v) : 0;
            }
            float score = sum_over<MEMBERS>(dot(q[0], key[0])), top = own ? score : -1e30f, sum = own;
            for (int start = first; start < stop; start += PLACES) {
                const uint4* slot = ring.take();
                #pragma unroll
                for (int j = 0; j < PLACES / TEAMS; j++) {
                    int l = j * TEAMS + team;
                    bool there = start + l < stop;
                    float k[E], v[E];
                    unpack(slot[l * MEMBERS + member], k);
                    unpack(slot[SLOT / 32 + l * MEMBERS + member], v);
                    score = sum_over<MEMBERS>(dot(q[0], k));
                    float higher = there ? fmaxf(top, score) : top, weight = there ? __expf(score - higher) : 0, fade = __expf(top - higher);
                    sum = sum * fade + weight, top = higher;
                    #pragma unroll
                    for (int e = 0; e < E; e++) out[e] = out[e] * fade + (there ? weight * v[e] : 0);
                }
                ring.give_back();
            }
            #pragma unroll
            for (int o = MEMBERS; o < 32; o *= 2) {  // the teams of a warp
                float higher = fmaxf(top, shuffle(top, o)), fade = __expf(top - higher);
                top = higher, sum *= fade, sum += shuffle(sum, o);
                #pragma unroll
                for (int e = 0; e < E; e++) out[e] *= fade, out[e] += shuffle(out[e], o);
            }
            sync();  // the item before this one is done
            if (threadIdx.x % 32 < MEMBERS) {
                #pragma unroll
                for (int e = 0; e < E; e++) shared.heads[warp][at + e] = out[e];
                shared.heads[warp][D] = top, shared.heads[warp][D + 1] = sum;
            }
            sync();
            finish(head, split);
        }
        stage_done();
    }

    // part, lse: what the warps found
    DEVICE void finish(int head, int split) {
        float top = -1e30f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, shared.heads[w][D]);
        for (int d = threadIdx.x; d < D; d += THREADS) {
            float sum = 0, out = 0;
            #pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float fade = __expf(shared.heads[w][D] - top);
                sum += fade * shared.heads[w][D + 1], out += fade * shared.heads[w][d];
            }
            put(part + (split * HEADS + head) * D + d, out / sum, number + 1);
            if (d == 0) put(lse + split * HEADS + head, top + __logf(sum), number + 1);
        }
    }

    // ---- The step

    template <class F, Input IN, bool ACTIVATE>
    DEVICE void ffn_linear(const Word* from, unsigned given, const float* norm, const float* bias, Word* rank, const Word* old, Word* to) {
        typedef typename F::First First;
        typedef typename F::Last Last;
        if constexpr (F::factors) {
            linear<First, IN, false>(from, given, norm, nullptr, nullptr, 0, rank, given);
            linear<Last, PLAIN, ACTIVATE>(rank, given, nullptr, bias, old, given, to, given);
        } else
            linear<First, IN, ACTIVATE>(from, given, norm, bias, old, given, to, given);
    }

    template <class Fc1, class Fc2> DEVICE void compute_layers(int begin, int end) {
        constexpr int hidden_size = Fc1::Last::all, size = 6 * N + QKV::all + hidden_size;
        for (int layer = begin; layer < end; layer++) {
            const float *norm1 = vectors + layer * size, *qkv_bias = norm1 + 2 * N, *proj_bias = qkv_bias + QKV::all, *norm2 = proj_bias + N,
                        *bias1 = norm2 + 2 * N, *bias2 = bias1 + hidden_size;
            linear<QKV, NORMED, false>(x, number, norm1, qkv_bias, nullptr, 0, qkv, number + 1);
            attention((Weight*)shared.table[layer][6], (Weight*)shared.table[layer][7]);
            linear<PROJ, PARTS, false>(part, number + 1, nullptr, proj_bias, x, number, y, number + 1);
            number++;
            ffn_linear<Fc1, NORMED, true>(y, number, norm2, bias1, rank1, nullptr, hidden);
            ffn_linear<Fc2, ACT == SWIGLU ? GATED : PLAIN, false>(hidden, number, nullptr, bias2, rank2, y, x);
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
        for (int row = threadIdx.x; row < my.count; row += THREADS) {
            int n = my.place(row);
            put(x + n, wide(wte[*token * N + n]) + (wpe ? wide(wpe[(long long)place * N + n]) : 0), number);
        }
        stage_done();
    }

    DEVICE void fetch_all() {
        LAYERS_OF(true)
        fetch<HEAD>((u64)head);
    }

    DEVICE void compute_all() {
        if (threadIdx.x == 0) arrive(counter);
        embed();
        LAYERS_OF(false)
        linear<HEAD, NORMED, false>(x, number, vectors + HEAD_NORM, nullptr, nullptr, 0, logits, 0);
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            while (arrivals(counter) < (launch + 1) * GRID) pause();  // until all have read the position
            *position = least(place + 1, length - 1);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) decode_step(Arguments arguments) {
    Shared& shared = *(Shared*)shared_memory();
    constexpr int before = (sizeof(Shared) + 127) / 128 * 128;
    int slots = least(MOST_SLOTS, (shared_bytes() - before) / SLOT);
    if (threadIdx.x < slots) {
        barrier_init(shared.full + threadIdx.x, 1);
        barrier_init(shared.empty + threadIdx.x, WARPS);
    }
    for (int i = threadIdx.x; i < LAYERS * 8; i += blockDim.x) shared.table[i / 8][i % 8] = arguments.table[i];
    Program program(arguments, shared, Ring{shared, shared_memory() + before, slots});
    __syncthreads();
    if (threadIdx.x < THREADS)
        program.compute_all();
    else if (threadIdx.x == THREADS)
        program.fetch_all();
}
