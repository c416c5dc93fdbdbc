// One sentence's window attention in bfloat16 products: what the operation hands to the code for AVX512-BF16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "mezo_perturb.h"

namespace fastpeft {

struct Matrix {  // rows (head or slot, token) of a sentence in bfloat16; elements of a row lie beside each other
    BFloat16* data;
    int64_t outer, token;  // strides

    BFloat16* row(int64_t o, int64_t t) const { return data + o * outer + t * token; }
};

// What all sentences share, and where a sentence stands.
struct Window {
    int64_t heads, tokens, width, number;  // number: k
    const int64_t* slots;                  // S real ones
    int64_t real;
    const int64_t* absent;  // k - S others
    const float* p;         // (k, D), widened
    bool causal;
    Drop* drop;  // of feature dropout; null where there is none
    uint64_t seed;
    uint32_t ordinal;  // 16 * block
    uint32_t threshold;
    double scale;

    int64_t keys() const { return real * tokens + number - real; }
};

struct Sentence {
    int64_t index;
    const bool* mask;  // of the tokens; null is all true
    Matrix c;
};

constexpr int64_t kRowTile = 64;   // queries whose scores exist at one time
constexpr int64_t kKeyBlock = 48;  // keys that backward works on at one time; numbers of keys are rounded up to these

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes that a sentence's pass needs beside its operands.
size_t forward_scratch(const Window& window);
size_t backward_scratch(const Window& window);

namespace avx512bf16 {
void attend(const Window& window, const Sentence& sentence, Matrix q, Matrix out, float* lse, char* scratch);

// dq, dc and dp (k, D), of this sentence alone
void attend_backward(const Window& window, const Sentence& sentence, Matrix dout, Matrix q, Matrix out,
                     const float* lse, Matrix dq, Matrix dc, float* dp, char* scratch);
}  // namespace avx512bf16

}  // namespace fastpeft
