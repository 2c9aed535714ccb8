// What Python and attention.cpp share. pispiral/model/kernels.py mirrors `Call` with ctypes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

using bf16 = uint16_t;

// Numbers from one batch, head or row to the next.
struct Strides {
    int64_t batch, head, row;
};

// One call: causal attention of the last L of N positions to a window of keys.
struct Call {
    const bf16 *q;       // [B, H, L, D], numbers of a row side by side, as in k, v and out
    const bf16 *k, *v;   // [B, Hk, N, D]
    bf16 *out;           // [B, H, L, D]
    bf16 *v_transposed;  // scratch, [B*Hk, blocks, KEYS/32, D, 32], from the first block of KEYS keys that a query sees
    float *lse;          // [B, H, L] log-sum-exp of the logits
    const float *slopes; // [H] of ALiBi, or null
    Strides q_strides, k_strides, v_strides, out_strides;
    int64_t B, H, Hk, L, N;
    int64_t window;      // keys a query sees, itself included; at most N
    double scale;        // of the logits
};

static_assert(std::is_standard_layout_v<Call> && std::is_trivially_copyable_v<Call>);
static_assert(sizeof(void *) == 8 && sizeof(Strides) == 24);
static_assert(offsetof(Call, slopes) == 48 && offsetof(Call, q_strides) == 56 && offsetof(Call, out_strides) == 128);
static_assert(offsetof(Call, B) == 152 && offsetof(Call, window) == 192 && offsetof(Call, scale) == 200);
static_assert(sizeof(Call) == 208);

extern "C" {
int64_t call_size();                                    // bytes of a Call
int64_t keys_per_block();                               // KEYS
int runs_here();                                        // has the CPU what this was compiled for?
int attention(const Call *call, int64_t head_dim);      // 0, or 1 if it was not compiled for heads of this size
}
