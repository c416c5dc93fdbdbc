// One sentence's window attention: what the operation hands to the code for an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "feature_dropout.h"

namespace fastpeft {

template <typename T>
struct TokenRows {  // rows (head or slot, token) of a sentence; elements of a row lie beside each other
    T* data;
    int64_t outer, token;  // strides

    T* row(int64_t o, int64_t t) const { return data + o * outer + t * token; }
};

// What all sentences share, and where a sentence stands.
struct Window {
    int64_t heads, tokens, width, number;  // number: k
    const int64_t* slots;                  // S real ones
    int64_t real;
    const int64_t* absent;  // k - S others
    const float* p;         // (k, D), widened
    bool causal;
    Drop* drop;       // of feature dropout; null where there is none
    Dropout dropout;  // of slot 0

    int64_t keys() const { return real * tokens + number - real; }
};

template <typename T>
struct Sentence {
    int64_t index;
    const bool* mask;  // of the tokens; null is all true
    TokenRows<T> c;
};

constexpr int64_t kRowTile = 64;  // queries whose scores exist at one time

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The passes over a sentence whose tensors hold T, and the bytes that they need beside these.
template <typename T>
struct PassesOf {
    size_t (*forward_scratch)(const Window& window);
    size_t (*backward_scratch)(const Window& window);
    void (*attend)(const Window& window, const Sentence<T>& sentence, TokenRows<T> q, TokenRows<T> out, float* lse,
                   char* scratch);
    // dq and dc, where they are not null, and dp (k, D), of this sentence alone
    void (*attend_backward)(const Window& window, const Sentence<T>& sentence, TokenRows<T> dout, TokenRows<T> q,
                            TokenRows<T> out, const float* lse, TokenRows<T> dq, TokenRows<T> dc, float* dp,
                            char* scratch);
};

struct Passes {  // that multiply in float32
    PassesOf<float> of_float;
    PassesOf<BFloat16> of_bfloat;
};

}  // namespace fastpeft
