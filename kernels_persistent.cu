// A decoding step of one sequence as one kernel that stays on the GPU from the embedding to the logits.
//
// At batch 1 a step reads every weight once and computes next to nothing: what counts is that memory never idles. Each multiprocessor
// runs one program: one warp that fetches and WARPS that compute. All matrices are cut into shares of rows, one share a program, which
// lie in one piece in memory. The fetching warp asks the copy engine for its program's shares, and its part of the KV cache, in the
// order in which they will be used, as long as a ring of slots in shared memory has room: half a layer ahead. What others compute never
// holds it up. The computing warps go from stage to stage (qkv, attention, proj, and one for each factor of the FFN); in between all
// programs meet at a barrier in global memory. Activations are float32 in small buffers that stay in L2.
//
// The host sets as macros: Weight (bf16 or float), GRID, WARPS, SLOT (bytes), N, HEADS, KV, D, LAYERS, SPLITS, ROPE, RMS, ACT, QKV, PROJ,
// HEAD (matrices), HEAD_NORM (where it begins in vectors), LAYERS_OF (calls of `layers`, one for each run of layers of one kind).

struct bf16 { unsigned short bits; };
enum Activation { GELU, RELU2, SWIGLU };
enum Input { PLAIN, NORMED, PARTS, GATED };
typedef unsigned long long u64;

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
DEVICE void release(u64* counter) {  // one thread releases for all: sync() has ordered their stores before it
    asm volatile("red.release.gpu.global.add.u64 [%0], 1;" :: "l"(counter) : "memory");
}
DEVICE u64 acquire(const u64* counter) {
    u64 value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
    return value;
}
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

DEVICE void load(float (&out)[E], const float* from) {  // what other programs wrote: from L2, since L1 may hold older values
    #pragma unroll
    for (int i = 0; i < E; i += 4) {
        float4 four = __ldcg((const float4*)(from + i));
        out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
}

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
    static constexpr int round = THREADS / (slot * batch) * slot * batch;                // rows between two looks at the sums
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
    float partial[THREADS * WARPS];                // sums of a row by warp
    float total[2][WARPS];
    float heads[WARPS][D + 2];                     // of each warp's part of the cache: output, largest score, denominator
};

struct Ring {
    Shared& shared;
    char* memory;
    int slots, slot = 0, phase = 0, asked = 0, late = 0, late_phase = 0;  // late: the first of the last FLIGHT slots asked for

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
    float *x, *qkv, *part, *lse, *rank, *hidden;
    Weight* logits;
    u64* counter;
    long long length;
    float eps;
};

struct Program : Arguments {
    Shared& shared;
    Ring ring;
    int place, reach, active;      // tokens in the cache; places for each of the `active` programs that share a head
    u64 target = 0;                // the next barrier

    DEVICE Program(const Arguments& arguments, Shared& shared, Ring ring) : Arguments(arguments), shared(shared), ring(ring) {
        place = *position;
        reach = most(REACH, (place + SPLITS - 1) / SPLITS);
        active = most(1, (place + reach - 1) / reach);
    }

    // ---- The fetching thread

    template <class M> DEVICE void fetch(u64 matrix) {
        M my;
        const char* from = (const char*)matrix + (long long)my.first * M::bytes;
        for (int done = 0; done < my.count; done += M::slot) {
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
            if constexpr (Fc1::factors) fetch<typename Fc1::Last>(row[3]);
            fetch<typename Fc2::First>(row[4]);
            if constexpr (Fc2::factors) fetch<typename Fc2::Last>(row[5]);
        }
    }

    // ---- The barrier: a counter that only grows, by GRID every time

    DEVICE void arrive() {
        sync();
        if (threadIdx.x == 0) release(counter);
        target += GRID;
    }

    DEVICE void wait() {
        if (threadIdx.x == 0)
            while (acquire(counter) < target) {}
        sync();
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

    // a = norm(a): a thread's entries, from k on, of x, whose mean and variance all threads find together
    template <class M> DEVICE void normalise(float (&a)[M::each][E], const float (&gain)[M::each][E], const float (&shift)[M::each][E]) {
        constexpr int n = (N + 4 * THREADS - 1) / (4 * THREADS);
        float4 mine[n];
        float sum = 0, squares = 0;
        #pragma unroll
        for (int i = 0; i < n; i++) {
            int at = 4 * (i * THREADS + threadIdx.x);
            mine[i] = at < N ? __ldcg((const float4*)(x + at)) : float4{0, 0, 0, 0};
            sum += mine[i].x + mine[i].y + mine[i].z + mine[i].w;
        }
        float mean = RMS ? 0 : total(sum, 0) / N;
        #pragma unroll
        for (int i = 0; i < n; i++)
            if (4 * (i * THREADS + threadIdx.x) < N) {
                float p = mine[i].x - mean, q = mine[i].y - mean, r = mine[i].z - mean, s = mine[i].w - mean;
                squares += p * p + q * q + r * r + s * s;
            }
        float scale = rsqrtf(total(squares, 1) / N + eps);
        #pragma unroll
        for (int c = 0; c < M::each; c++)
            #pragma unroll
            for (int e = 0; e < E; e++) a[c][e] = (a[c][e] - mean) * scale * gain[c][e] + shift[c][e];
    }

    // a = entries k to k + E of attention's output: its parts, each with the logarithm of its softmax's denominator
    DEVICE void join(float (&a)[E], int k) {
        float each[SPLITS], parts[SPLITS][E], top = -1e30f, sum = 0;
        #pragma unroll
        for (int s = 0; s < SPLITS; s++)
            if (s < active) {
                each[s] = __ldcg(lse + s * HEADS + k / D);
                load(parts[s], part + s * HEADS * D + k);
            }
        #pragma unroll
        for (int s = 0; s < SPLITS; s++)
            if (s < active) top = fmaxf(top, each[s]);
        #pragma unroll
        for (int e = 0; e < E; e++) a[e] = 0;
        #pragma unroll
        for (int s = 0; s < SPLITS; s++)
            if (s < active) {
                float weight = __expf(each[s] - top);
                sum += weight;
                #pragma unroll
                for (int e = 0; e < E; e++) a[e] += weight * parts[s][e];
            }
        #pragma unroll
        for (int e = 0; e < E; e++) a[e] /= sum;
    }

    // What this thread multiplies with: pieces member, member + group, ... of `from`, behind the barrier
    template <class M, Input IN> DEVICE void input(float (&a)[M::each][E], const float* from, const float* norm, int block) {
        float gain[M::each][E], shift[M::each][E];
        int k = block * M::K + threadIdx.x % M::group * E;
        #pragma unroll
        for (int c = 0; c < M::each; c++)
            if (IN == NORMED && k + c * M::group * E < (block + 1) * M::K) {
                load(gain[c], norm + k + c * M::group * E);
                load(shift[c], norm + N + k + c * M::group * E);
            }
        wait();
        #pragma unroll
        for (int c = 0; c < M::each; c++) {
            int at = k + c * M::group * E;
            if (at >= (block + 1) * M::K) continue;
            if (IN == PARTS)
                join(a[c], at);
            else
                load(a[c], from + at);
            if (IN == GATED) {
                float value[E];
                load(value, from + M::K * M::blocks + at);
                #pragma unroll
                for (int e = 0; e < E; e++) a[c][e] = a[c][e] / (1 + __expf(-a[c][e])) * value[e];
            }
        }
        if constexpr (IN == NORMED) normalise<M>(a, gain, shift);
    }

    // partial[row][warp] = this warp's share of the rows in the next `batch` slots times a
    template <class M> DEVICE void multiply(const float (&a)[M::each][E], int done, int count) {
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
        if (lane % (32 / n) == 0 && i < M::batch * M::rows && group < M::groups && row < count) shared.partial[row * warps + member / 32] = sum;
    }

    // to = act(matrix input + bias), or to += that, behind the barrier
    template <class M, Input IN, bool ACTIVATE, bool ADD, class T> DEVICE void linear(const float* from, const float* norm, const float* bias, T* to) {
        constexpr int warps = M::group / 32;
        M my;
        float a[M::each][E], extra = bias && threadIdx.x < my.count ? __ldcg(bias + my.place(threadIdx.x)) : 0;
        input<M, IN>(a, from, norm, my.block);
        for (int begin = 0; begin < my.count; begin += M::round) {
            int count = least(M::round, my.count - begin), row = begin + threadIdx.x;
            if (begin) {
                sync();  // the sums before these are read
                extra = bias && threadIdx.x < count ? __ldcg(bias + my.place(row)) : 0;
            }
            if constexpr (ADD)
                if (threadIdx.x < count) extra += __ldcg(to + my.place(row));
            for (int done = 0; done < count; done += M::batch * M::slot) multiply<M>(a, done, count);
            sync();
            if (threadIdx.x < count) {
                #pragma unroll
                for (int w = 0; w < warps; w++) extra += shared.partial[threadIdx.x * warps + w];
                narrow(ACTIVATE ? activate(extra) : extra, to[my.place(row)]);
            }
        }
    }

    // ---- Attention: an item is a query head and `reach` places of the cache

    // entries `at` to at + E of a head's query or key, turned by its position
    DEVICE void turned(float (&out)[E], const float* vector, int at) {
        load(out, vector + at);
        if (ROPE) {
            float other[E];
            load(other, vector + (at + D / 2) % D);
            #pragma unroll
            for (int e = 0; e < E; e++)  // the first half of sin is negative
                out[e] = out[e] * cos[place * D + at + e] + other[e] * sin[place * D + at + e];
        }
    }

    DEVICE void attention(Weight* keys, Weight* values) {
        int member = threadIdx.x % MEMBERS, team = threadIdx.x / MEMBERS, warp = threadIdx.x / 32, at = member * E;
        wait();
        for (int item = blockIdx.x; item < HEADS * active; item += GRID) {
            int head = item % HEADS, split = item / HEADS, kv = head / (HEADS / KV);
            int first = split * reach, stop = least(first + reach, place);
            float q[E], key[E], value[E], out[E];
            turned(q, qkv + head * D, at);
            turned(key, qkv + (HEADS + kv) * D, at);
            load(value, qkv + (HEADS + KV + kv) * D + at);
            bool own = split == 0 && team == 0;  // the new token begins the running softmax of one team, so nothing just stored is read
            long long here = ((long long)kv * length + place) * D + at;
            #pragma unroll
            for (int e = 0; e < E; e++) {
                Weight k, v;
                narrow(key[e], k), narrow(value[e], v);
                if (own && head % (HEADS / KV) == 0) keys[here + e] = k, values[here + e] = v;
                q[e] *= rsqrtf(D), key[e] = wide(k), value[e] = wide(v);
                out[e] = own ? value[e] : 0;
            }
            float score = sum_over<MEMBERS>(dot(q, key)), top = own ? score : -1e30f, sum = own;
            for (int start = first; start < stop; start += PLACES) {
                const uint4* slot = ring.take();
                #pragma unroll
                for (int j = 0; j < PLACES / TEAMS; j++) {
                    int l = j * TEAMS + team;
                    bool there = start + l < stop;
                    float k[E], v[E];
                    unpack(slot[l * MEMBERS + member], k);
                    unpack(slot[SLOT / 32 + l * MEMBERS + member], v);
                    score = sum_over<MEMBERS>(dot(q, k));
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
            if (item != blockIdx.x) sync();  // the item before this one is done
            if (threadIdx.x % 32 < MEMBERS) {
                #pragma unroll
                for (int e = 0; e < E; e++) shared.heads[warp][at + e] = out[e];
                shared.heads[warp][D] = top, shared.heads[warp][D + 1] = sum;
            }
            sync();
            finish(head, split);
        }
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
            part[(split * HEADS + head) * D + d] = out / sum;
            if (d == 0) lse[split * HEADS + head] = top + __logf(sum);
        }
    }

    // ---- The step

    template <class F, Input IN, bool ACTIVATE, bool ADD> DEVICE void ffn_linear(const float* from, const float* norm, const float* bias, float* to) {
        typedef typename F::First First;
        typedef typename F::Last Last;
        if constexpr (F::factors) {
            linear<First, IN, false, false>(from, norm, nullptr, rank);
            arrive();
            linear<Last, PLAIN, ACTIVATE, ADD>(rank, nullptr, bias, to);
        } else
            linear<First, IN, ACTIVATE, ADD>(from, norm, bias, to);
        arrive();
    }

    template <class Fc1, class Fc2> DEVICE void compute_layers(int begin, int end) {
        constexpr int hidden_size = Fc1::Last::all, size = 6 * N + QKV::all + hidden_size;
        for (int layer = begin; layer < end; layer++) {
            const float *norm1 = vectors + layer * size, *qkv_bias = norm1 + 2 * N, *proj_bias = qkv_bias + QKV::all, *norm2 = proj_bias + N,
                        *bias1 = norm2 + 2 * N, *bias2 = bias1 + hidden_size;
            linear<QKV, NORMED, false, false>(x, norm1, qkv_bias, qkv);
            arrive();
            attention((Weight*)shared.table[layer][6], (Weight*)shared.table[layer][7]);
            arrive();
            linear<PROJ, PARTS, false, true>(nullptr, nullptr, proj_bias, x);
            arrive();
            ffn_linear<Fc1, NORMED, true, false>(x, norm2, bias1, hidden);
            ffn_linear<Fc2, ACT == SWIGLU ? GATED : PLAIN, false, true>(hidden, nullptr, bias2, x);
        }
    }

    template <class Fc1, class Fc2> DEVICE void layers(bool fetching, int begin, int end) {
        if (fetching)
            fetch_layers<Fc1, Fc2>(begin, end);
        else
            compute_layers<Fc1, Fc2>(begin, end);
    }

    DEVICE void fetch_all() {
        LAYERS_OF(true)
        fetch<HEAD>((u64)head);
    }

    DEVICE void compute_all() {
        target = acquire(counter) / GRID * GRID;  // nobody is past the first barrier before this program arrives
        for (int n = threadIdx.x; n < N; n += THREADS)  // every program the same
            x[n] = wide(wte[*token * N + n]) + (wpe ? wide(wpe[(long long)place * N + n]) : 0);
        LAYERS_OF(false)
        linear<HEAD, NORMED, false, false>(x, vectors + HEAD_NORM, nullptr, logits);
        if (blockIdx.x == 0 && threadIdx.x == 0) *position = least(place + 1, length - 1);  // all have read it before the first barrier
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
