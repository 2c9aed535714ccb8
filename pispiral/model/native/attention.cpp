// FlashAttention (Dao et al. 2022) for bfloat16 on AVX-512, with everything transposed: logits are K Q^T, a key a row
// and a query a column, so that maximum and sum run down the rows, and the weights leave as the second product V^T P
// wants them.
#include "attention.h"

#include <omp.h>
#include <algorithm>
#include <cmath>
#include <new>

#include "bf16.h"

constexpr int GROUP = 12; // blocks of queries for which a block of keys is fetched once
constexpr int NEAR = 8;   // blocks of keys that each of them sees in turn: its sums stay in the first cache
constexpr int PENDING = 2; // and those of which the values are summed at a time

// QUERIES queries that share a key head, and what they have gathered.
template <int D>
struct Block {
    alignas(64) float o[D*QUERIES], slope[QUERIES]; // sums of weighted values; ALiBi's slope over the logits' scale
    alignas(64) bf16 q[D*QUERIES];
    alignas(64) int position[QUERIES];
    Vector top[2], sum[2]; // log2 of what weights are divided by; sums of weights
    int64_t head[QUERIES], row[QUERIES], n, first, last;
};

// Weights whose values have not been summed yet.
struct Pending {
    const bf16 *values = nullptr, *weights = nullptr;
    int64_t keys = 0;
};

// Values of 32 keys, [32, D] -> [D, 32]; keys beyond the last are zeros.
template <int D>
static void transpose_values(const Call &c, int64_t batch, int64_t kv, int64_t key, bf16 *out) {
    alignas(64) bf16 filled[32*D];
    const bf16 *v = c.v + batch*c.v_strides.batch + kv*c.v_strides.head + key*c.v_strides.row;
    int64_t stride = c.v_strides.row;
    if (const int64_t n = c.N - key; n < 32) {
        memset(filled, 0, sizeof filled);
        for (int64_t i = 0; i < n; i++) memcpy(filled + i*D, v + i*stride, 2*D);
        v = filled, stride = D;
    }
    for (int d = 0; d < D; d += 16)
        for (int k = 0; k < 32; k += 16) transpose(v + k*stride + d, stride, out + d*32 + k, 32);
}

// Block i of a key head's queries. Of a long chunk they are rows of one head; of a short one, rows of all heads that
// share the keys. Where there are fewer than QUERIES, the first is repeated.
template <int D>
static void begin(Block<D> &b, const Call &c, int64_t batch, int64_t kv, int64_t i) {
    const int64_t heads = c.H/c.Hk;
    alignas(64) bf16 rows[QUERIES*D];
    memset(b.o, 0, sizeof b.o);
    b.first = c.N, b.last = -1, b.n = 0;
    for (int x = 0; x < QUERIES; x++) {
        int64_t at = i*QUERIES + x, g = at/c.L, l = at % c.L;
        if (c.L >= QUERIES) g = i % heads, l = i/heads*QUERIES + x;
        if (g < heads && l < c.L) b.head[b.n] = kv*heads + g, b.row[b.n++] = l;
        else g = b.head[0] - kv*heads, l = b.row[0];
        memcpy(rows + x*D, c.q + batch*c.q_strides.batch + (kv*heads + g)*c.q_strides.head + l*c.q_strides.row, 2*D);
        b.position[x] = (int)(c.N - c.L + l);
        b.slope[x] = c.slopes ? c.slopes[kv*heads + g]/(float)c.scale : 0;
        b.first = std::min(b.first, (int64_t)b.position[x]), b.last = std::max(b.last, (int64_t)b.position[x]);
    }
    for (int h = 0; h < 2; h++) {
        for (int d = 0; d < D; d += 32) transpose_pairs(rows + 16*h*D + d, D, b.q + d*QUERIES + 32*h);
        b.top[h] = all(-1e30f), b.sum[h] = all(0);
    }
}

// What 1 + f is above 2^f in 1/128, for f = 2i/128 and (2i + 1)/128.
alignas(64) static const uint8_t CURVE[64] = {
    0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5, 6, 6, 7, 7, 8, 8, 8, 9, 9, 9, 9, 10, 10, 10, 10, 10, 11, 11, 11, 11, 11,
    11, 11, 11, 11, 11, 11, 11, 11, 11, 10, 10, 10, 10, 10, 9, 9, 9, 8, 8, 8, 7, 7, 6, 6, 5, 5, 4, 3, 3, 2, 1, 1};

template <int D>
static inline void sum_values(Block<D> &b, Pending &p) {
    for (int d = 0; p.keys && d < D; d += 32)
        multiply<true>(b.o + d*QUERIES, (int)p.keys/2, p.values + 32*d, 32, 32*D, p.weights);
    p.keys = 0;
}

// Hide what a query may not see, and add ALiBi's bias, in rows [r, end) of the logits.
template <int D>
static inline void mask(const Block<D> &b, const Call &c, float *logits, int64_t key, int64_t r, int64_t end) {
    for (; r < end; r++)
        for (int h = 0; h < 2; h++) {
            __m512i position = _mm512_load_si512(b.position + 16*h);
            __m512i distance = _mm512_sub_epi32(position, _mm512_set1_epi32((int)(key + r)));
            __mmask16 seen = _mm512_cmplt_epu32_mask(distance, _mm512_set1_epi32((int)c.window));
            Vector bias = _mm512_mul_ps(_mm512_load_ps(b.slope + 16*h), _mm512_cvtepi32_ps(distance));
            float *at = logits + r*QUERIES + 16*h;
            _mm512_store_ps(at, _mm512_mask_sub_ps(all(-INFINITY), seen, _mm512_load_ps(at), bias));
        }
}

// Weights 2^(logit - top) of 16 queries for rows [from, to), as the bits of bfloat16 (after Schraudolph 1999): x,
// rounded to 1/128 as a float whose last bit counts ones, is exponent and fraction at once, and CURVE takes from the
// fraction what 1 + f is above 2^f. Returns which queries have a weight of 2 or more.
static inline __attribute__((always_inline)) __mmask16 weigh(const float *logits, int h, int from, int to, float unit,
                                                             Vector top, bf16 *weights, Vector *sum) {
    const Vector ones = all(12582912.f), slope = all(unit*128); // 1.5 * 2^23: the last bit counts ones
    const Vector base = _mm512_fnmadd_ps(all(128), top, all(12582912.f + 127*128));
    const __m512i curve = _mm512_load_si512(CURVE), one = _mm512_set1_epi16(0x3f80);
    __m512i bits = _mm512_setzero_si512();
    sum[0] = sum[1] = all(0);
    for (int r = from; r < to; r += 4)
        for (int i = 0; i < 2; i++) {
            const float *at = logits + (r + 2*i)*QUERIES + 16*h;
            __m512i x = (__m512i)_mm512_max_ps(ones, _mm512_fmadd_ps(slope, _mm512_load_ps(at), base));
            __m512i y = (__m512i)_mm512_max_ps(ones, _mm512_fmadd_ps(slope, _mm512_load_ps(at + QUERIES), base));
            bits = _mm512_ternarylogic_epi32(bits, x, y, 0xfe); // or
            __m512i p = _mm512_mask_blend_epi16(0xaaaaaaaa, x, _mm512_slli_epi32(y, 16));
            __m512i index = _mm512_srli_epi16(p, 1);
            p = _mm512_sub_epi16(p, _mm512_maskz_permutexvar_epi8(0x5555555555555555, index, curve));
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)p, (__m512bh)one);
            _mm512_store_si512(weights + (r + 2*i)*QUERIES + 32*h, p);
        }
    return _mm512_test_epi32_mask(bits, _mm512_set1_epi32(~0x4b403fff));
}

// One block of queries sees one block of keys: logits, mask, weights. The values wait in `p`.
template <int D>
static inline void see(Block<D> &b, const Call &c, const bf16 *k, int64_t stride, const bf16 *values, int64_t key,
                       float *logits, bf16 *weights, Pending &p) {
    const float unit = (float)c.scale*1.44269504f;
    const int from = (int)(std::max<int64_t>(0, b.first - c.window + 1 - key)/32*32);
    const int to = (int)std::min<int64_t>(KEYS, (b.last - key + 32)/32*32);
    for (int r = from; r < to; r += 32) multiply<false>(logits + r*QUERIES, D/2, k + r*stride, stride, 32, b.q);
    if (c.slopes) mask(b, c, logits, key, from, to);
    else { // only rows at the window's edge and at the diagonal
        const int64_t gone = std::clamp<int64_t>(b.last - c.window - key + 1, from, to);
        mask(b, c, logits, key, from, gone);
        mask(b, c, logits, key, std::max(gone, b.first - key + 1), to);
    }
    for (int h = 0; h < 2; h++) { // 16 columns at a time, so that no query's rounding depends on its neighbours
        Vector sum[2];
        if (__mmask16 grows = weigh(logits, h, from, to, unit, b.top[h], weights, sum)) {
            sum_values<D>(b, p); // the weights that wait were made with the maximum that was
            Vector most[2] = {all(-INFINITY), all(-INFINITY)};
            for (int r = from; r < to; r += 2)
                for (int i = 0; i < 2; i++)
                    most[i] = _mm512_max_ps(most[i], _mm512_load_ps(logits + (r + i)*QUERIES + 16*h));
            // a multiple of 1/128, 2^7 above the maximum: there is room for a factor of 256
            Vector above = _mm512_fmadd_ps(all(unit), _mm512_max_ps(most[0], most[1]), all(7));
            Vector top = _mm512_mask_roundscale_ps(b.top[h], grows, above, 7 << 4);
            Vector less = _mm512_mask_mov_ps(all(1), grows, power2(_mm512_sub_ps(b.top[h], top)));
            b.top[h] = top;
            b.sum[h] = _mm512_mul_ps(b.sum[h], less);
            for (int d = 0; d < D; d++) {
                float *o = b.o + d*QUERIES + 16*h;
                _mm512_store_ps(o, _mm512_mul_ps(less, _mm512_load_ps(o)));
            }
            __mmask16 lost = weigh(logits, h, from, to, unit, b.top[h], weights, sum);
            sum[0] = _mm512_mask_mov_ps(sum[0], lost, all(NAN)); // a NaN or an infinity has no number as its weight
        }
        b.sum[h] = _mm512_add_ps(b.sum[h], _mm512_add_ps(sum[0], sum[1]));
    }
    if (!p.keys) p.values = values + from*D, p.weights = weights + from*QUERIES;
    p.keys += to - from;
}

// Divide by the sums and write the rows; a query that saw nothing gets zeros.
template <int D>
static void end(const Block<D> &b, const Call &c, int64_t batch) {
    alignas(64) float sum[QUERIES], top[QUERIES];
    alignas(64) bf16 columns[D*QUERIES], rows[QUERIES*D];
    Vector part[2];
    for (int h = 0; h < 2; h++) {
        _mm512_store_ps(sum + 16*h, b.sum[h]), _mm512_store_ps(top + 16*h, b.top[h]);
        part[h] = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b.sum[h], all(0), _CMP_NEQ_UQ), all(1), b.sum[h]);
    }
    for (int d = 0; d < D; d++) {
        Vector y[2];
        for (int h = 0; h < 2; h++) y[h] = _mm512_mul_ps(part[h], _mm512_load_ps(b.o + d*QUERIES + 16*h));
        _mm512_store_si512(columns + d*QUERIES, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
    }
    for (int d = 0; d < D; d += 16)
        for (int x = 0; x < QUERIES; x += 16) transpose(columns + d*QUERIES + x, QUERIES, rows + x*D + d, D);
    for (int x = 0; x < b.n; x++) {
        const Strides &to = c.out_strides;
        memcpy(c.out + batch*to.batch + b.head[x]*to.head + b.row[x]*to.row, rows + x*D, 2*D);
        c.lse[(batch*c.H + b.head[x])*c.L + b.row[x]] = (top[x] + std::log2(sum[x]))*0.69314718f;
    }
}

// A thread's own room.
template <int D>
struct Scratch {
    alignas(64) float logits[KEYS*QUERIES];
    alignas(64) bf16 weights[PENDING*KEYS*QUERIES], tail[KEYS*D];
    Block<D> block[GROUP];
};

// `n` blocks of queries from block `from` on, of one key head: all keys that they see.
template <int D>
static void attend_group(Scratch<D> &s, const Call &c, int64_t batch, int64_t kv, int64_t from, int64_t n,
                         const bf16 *v_transposed) {
    int64_t first = c.N, last = -1;
    for (int64_t i = 0; i < n; i++) {
        begin<D>(s.block[i], c, batch, kv, from + i);
        first = std::min(first, s.block[i].first), last = std::max(last, s.block[i].last);
    }
    const bf16 *k = c.k + batch*c.k_strides.batch + kv*c.k_strides.head;
    const int64_t final_block = last/KEYS;
    if (final_block*KEYS + KEYS > c.N) { // it is not full: keys that are not there are zeros
        memset(s.tail, 0, sizeof s.tail);
        for (int64_t key = final_block*KEYS; key < c.N; key++)
            memcpy(s.tail + key % KEYS*D, k + key*c.k_strides.row, 2*D);
    }
    for (int64_t near = std::max<int64_t>(0, first - c.window + 1)/KEYS; near <= final_block; near += NEAR)
        for (int64_t i = 0; i < n; i++) {
            Block<D> &b = s.block[i];
            Pending pending;
            for (int64_t j = near; j <= std::min(near + NEAR - 1, final_block); j++) {
                const int64_t key = j*KEYS, at = (j - near) % PENDING;
                const bool partial = key + KEYS > c.N;
                if (key <= b.last && key + KEYS > b.first - c.window + 1)
                    see<D>(b, c, partial ? s.tail : k + key*c.k_strides.row, partial ? D : c.k_strides.row,
                           v_transposed + key*D, key, s.logits, s.weights + at*KEYS*QUERIES, pending);
                if (at == PENDING - 1) sum_values<D>(b, pending);
            }
            sum_values<D>(b, pending);
        }
    for (int64_t i = 0; i < n; i++) end<D>(s.block[i], c, batch);
}

template <int D>
static void attend(const Call &c) {
    const int64_t per_head = c.H/c.Hk, heads = c.B*c.Hk;
    const int64_t whole = (c.L + QUERIES - 1)/QUERIES*per_head, shared = (c.L*per_head + QUERIES - 1)/QUERIES;
    const int64_t queries = c.L >= QUERIES ? whole : shared; // blocks of them
    const int64_t most = std::clamp<int64_t>(heads*queries/(2*omp_get_max_threads()), 1, GROUP);
    const int64_t groups = (queries + most - 1)/most;
    const int64_t origin = std::max<int64_t>(0, c.N - c.L - c.window + 1)/KEYS; // the first block that any query sees
    const int64_t blocks = (c.N + KEYS - 1)/KEYS - origin, parts = blocks*(KEYS/32);
#pragma omp parallel
    {
#pragma omp for
        for (int64_t t = 0; t < heads*parts; t++) {
            const int64_t head = t/parts, key = origin*KEYS + t % parts*32;
            bf16 *out = c.v_transposed + (head*blocks - origin)*KEYS*D + key*D;
            if (key < c.N) transpose_values<D>(c, head/c.Hk, head % c.Hk, key, out);
        }
        auto *scratch = new Scratch<D>;
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < heads*groups; t++) {
            const int64_t head = t % heads, from = (groups - 1 - t/heads)*most; // the longest spans first
            attend_group<D>(*scratch, c, head/c.Hk, head % c.Hk, from, std::min(most, queries - from),
                            c.v_transposed + (head*blocks - origin)*KEYS*D);
        }
        delete scratch;
    }
}

int64_t call_size() { return sizeof(Call); }
int64_t keys_per_block() { return KEYS; }
int runs_here() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi"); }

int attention(const Call *call, int64_t head_dim) {
    switch (head_dim) {
    case 32: attend<32>(*call); return 0;
    case 64: attend<64>(*call); return 0;
    case 96: attend<96>(*call); return 0;
    case 128: attend<128>(*call); return 0;
    default: return 1;
    }
}
