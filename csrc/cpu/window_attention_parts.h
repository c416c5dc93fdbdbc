// What the window attention passes share, compiled once for each instruction set; the including file defines the macros
// that siva_linear_tile.h explains. Nothing of the standard library is called here.
#pragma once

#include "vectors.h"
#include "window_attention.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

constexpr float kInfinite = __builtin_inff();
constexpr int32_t kHidden = -1, kAbsent = -2;

class Scratch {
  public:
    explicit Scratch(char* at) : at_(reinterpret_cast<uintptr_t>(at)) {}

    template <typename T>
    T* take(int64_t count) {
        T* found = reinterpret_cast<T*>(at_);
        at_ += round_up(count * sizeof(T), 64);
        return found;
    }

    uintptr_t end() const { return at_; }

  private:
    uintptr_t at_;
};

FASTPEFT_TARGET inline Float larger(Float a, Float b) { return a > b ? a : b; }

// Of what is not above 0; 0 from -87 down, where results would soon be subnormal, and NaN of NaN
FASTPEFT_TARGET inline Float exponential(Float x) {
    const float whole = 12582912.0f;  // the sum with 1.5 * 2^23 is rounded to an integer, in the lowest bits
    const Float moved = multiply_add(x, broadcast(1.44269504f), broadcast(whole));
    const Float n = moved - whole;
    Float t = multiply_add(n, broadcast(-0.693359375f), x);
    t = multiply_add(n, broadcast(2.12194440e-4f), t);
    Float y = broadcast(1.9875691500e-4f);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
#pragma GCC unroll 5
    for (const float term : terms) y = multiply_add(y, t, broadcast(term));
    y = multiply_add(y, t * t, t + 1.0f);
    const Float power = (Float)(((Word)moved + 127) << 23);  // 2^n
    return (Float)((Word)(y * power) & ~(Word)(x < -87.0f));
}

// Feature dropout of the s-th real slot (T, D)
FASTPEFT_TARGET inline void drop(const Window& window, int64_t sentence, int64_t s, float* features) {
    if (window.drop == nullptr) return;
    const int64_t count = window.tokens * window.width;
    Dropout dropout = window.dropout;
    dropout.ordinal += static_cast<uint32_t>(window.slots[s]);
    window.drop(features, Format::kFloat32, sentence * count, count, dropout);
}

// The features of the s-th real slot (T, D), widened and dropped
template <typename T>
FASTPEFT_TARGET inline void read_features(const Window& window, const Sentence<T>& sentence, int64_t s,
                                          float* features) {
    for (int64_t t = 0; t < window.tokens; ++t) {
        const T* __restrict from = sentence.c.row(s, t);
        float* __restrict to = features + t * window.width;
        for (int64_t d = 0; d < window.width; ++d) to[d] = fastpeft::load(from[d]);
    }
    drop(window, sentence.index, s, features);
}

// count elements, then zeros up to the end of a register
template <typename T>
FASTPEFT_TARGET inline void read_row(const T* from, int64_t count, float* to) {
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) store(load(from + d), to + d);
    if (d < count) store(load(from + d, count - d), to + d);
}

template <typename T>
FASTPEFT_TARGET inline void write_row(const float* from, int64_t count, T* to) {
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) store(load(from + d), to + d);
    if (d < count) store(load(from + d, count - d), to + d, count - d);
}

template <typename T>
FASTPEFT_TARGET inline float dot(const T* a, const T* b, int64_t count) {
    Float sums = {};
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) sums = multiply_add(load(a + d), load(b + d), sums);
    if (d < count) sums = multiply_add(load(a + d, count - d), load(b + d, count - d), sums);
    return sum_of_lanes(sums);
}

// What the scores of a tile of queries depend on beside the products.
struct Visible {
    int32_t token[kRowTile];    // of the query
    float of_absent[kRowTile];  // log of the number of tokens that it sees
};

FASTPEFT_TARGET inline Visible visible(const Window& window, const bool* mask, int64_t first) {
    Visible found;
    for (int64_t r = 0; r < kRowTile; ++r) {
        const int64_t token = (first + r) % window.tokens;
        found.token[r] = token;
        if (window.real == window.number) continue;
        int64_t number = window.causal ? token + 1 : window.tokens;
        if (mask != nullptr) {
            const int64_t last = number;
            number = 0;
            for (int64_t t = 0; t < last; ++t) number += mask[t];
        }
        found.of_absent[r] = number > 0 ? __builtin_logf(static_cast<float>(number)) : -kInfinite;
    }
    return found;
}

// The score of a key of `token` as it counts: -infinity where it is hidden
FASTPEFT_TARGET inline Float counted(Float score, int32_t token, bool causal, const Visible& seen, int64_t lane) {
    if (token == kHidden) return broadcast(-kInfinite);
    if (token == kAbsent) return score + load(seen.of_absent + lane);
    if (!causal) return score;
    Signed of_query;
    std::memcpy(&of_query, seen.token + lane, sizeof of_query);
    return of_query < token ? broadcast(-kInfinite) : score;
}

// dc and dp of a sentence from the gradients of its keys, which stand in the order of make_keys
template <typename T>
FASTPEFT_TARGET void give(const Window& window, const Sentence<T>& sentence, const float* dkeys, int64_t stride,
                          float* features, TokenRows<T> dc, float* dp) {
    const int64_t tokens = window.tokens, width = window.width;
    for (int64_t s = 0; s < window.real; ++s) {
        float* __restrict sums = dp + window.slots[s] * width;
        for (int64_t d = 0; d < width; ++d) sums[d] = 0;
        for (int64_t t = 0; t < tokens; ++t) {
            float* __restrict to = features + t * width;
            if (sentence.mask != nullptr && !sentence.mask[t]) {
                for (int64_t d = 0; d < width; ++d) to[d] = 0;
                continue;
            }
            const float* __restrict from = dkeys;
            for (int64_t d = 0; d < width; ++d) sums[d] += to[d] = from[d];
            dkeys += stride;
        }
        if (dc.data == nullptr) continue;
        drop(window, sentence.index, s, features);
        for (int64_t t = 0; t < tokens; ++t) write_row(features + t * width, width, dc.row(s, t));
    }
    for (int64_t a = 0; a < window.number - window.real; ++a, dkeys += stride) {
        write_row(dkeys, width, dp + window.absent[a] * width);
    }
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
