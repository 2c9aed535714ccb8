// Vectors of 16 numbers: fp32 between loading and storing, bfloat16 in memory.
#pragma once
// GCC 12 warns of its own intrinsics' undefined operands (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <cstdint>
#include <cstring>

#include "attention.h"

using Vector = __m512;

constexpr int KEYS = 128;   // keys that a block of queries sees at a time
constexpr int QUERIES = 32; // queries in a block: the columns of every product

static inline Vector all(float x) { return _mm512_set1_ps(x); }

// 2^x: the whole part goes into the exponent, the rest through a polynomial (relative error 2.6e-6).
static inline Vector power2(Vector x) {
    constexpr float c[] = {.0135341704f, .0520114636f, .241442749f, .693003838f, 1.00000259f};
    Vector fraction = _mm512_reduce_ps(x, 1), p = all(c[0]);
    for (int i = 1; i < 5; i++) p = _mm512_fmadd_ps(p, fraction, all(c[i]));
    return _mm512_scalef_ps(p, x);
}

// c[32, QUERIES] (+)= a[32, 2*pairs] b, b as [pairs, QUERIES, 2].
// In a, rows are `stride` apart and every 32 columns begin `block` after the 32 before.
template <bool ADD>
static inline void multiply(float *c, int pairs, const bf16 *a, int64_t stride, int64_t block, const bf16 *b) {
    for (int r = 0; r < 32; r += 8) {
        Vector sum[8][2];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 2; h++)
                sum[i][h] = ADD ? _mm512_load_ps(c + (r + i)*QUERIES + 16*h) : _mm512_setzero_ps();
        for (int p = 0; p < pairs; p++) {
            const bf16 *at = a + r*stride + p/16*block + p%16*2;
            __m512bh b0 = (__m512bh)_mm512_load_si512(b + p*64), b1 = (__m512bh)_mm512_load_si512(b + p*64 + 32);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                int two;
                memcpy(&two, at + i*stride, 4);
                __m512bh x = (__m512bh)_mm512_set1_epi32(two);
                sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
                sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            for (int h = 0; h < 2; h++) _mm512_store_ps(c + (r + i)*QUERIES + 16*h, sum[i][h]);
    }
}

// 16 rows of 16 numbers become 16 columns, which are `apart` from each other.
static inline void transpose(const bf16 *in, int64_t stride, bf16 *out, int64_t apart) {
    __m256i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm256_loadu_si256((const __m256i *)(in + i*stride));
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm256_unpacklo_epi16(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi16(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            a[i + 2*h] = _mm256_unpacklo_epi32(b[i + h], b[i + 2 + h]);
            a[i + 2*h + 1] = _mm256_unpackhi_epi32(b[i + h], b[i + 2 + h]);
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + 2*j] = _mm256_unpacklo_epi64(a[i + j], a[i + 4 + j]);
            b[i + 2*j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + 4 + j]);
        }
    for (int j = 0; j < 8; j++) {
        _mm256_storeu_si256((__m256i *)(out + j*apart), _mm256_permute2x128_si256(b[j], b[8 + j], 0x20));
        _mm256_storeu_si256((__m256i *)(out + (j + 8)*apart), _mm256_permute2x128_si256(b[j], b[8 + j], 0x31));
    }
}

// 16 rows of 16 pairs become 16 columns of pairs, the left or right half of a block of queries.
static inline void transpose_pairs(const bf16 *in, int64_t stride, bf16 *out) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i*stride);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int h = 0; h < 2; h++) {
            a[i + 2*h] = _mm512_unpacklo_epi64(b[i + h], b[i + 2 + h]);
            a[i + 2*h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + 2 + h]);
        }
    for (int j = 0; j < 4; j++) { // lane l of a[4i + j]: column 4l + j of rows 4i to 4i + 3
        __m512i even[2] = {_mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88)};
        __m512i odd[2] = {_mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd), _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd)};
        _mm512_store_si512(out + j*2*QUERIES, _mm512_shuffle_i32x4(even[0], even[1], 0x88));
        _mm512_store_si512(out + (4 + j)*2*QUERIES, _mm512_shuffle_i32x4(odd[0], odd[1], 0x88));
        _mm512_store_si512(out + (8 + j)*2*QUERIES, _mm512_shuffle_i32x4(even[0], even[1], 0xdd));
        _mm512_store_si512(out + (12 + j)*2*QUERIES, _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd));
    }
}
