// What is compiled once for each instruction set, and which of them runs. Nothing of torch, so the C++ tests run it by
// itself.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "feature_dropout.h"
#include "mezo_perturb.h"
#include "storage.h"
#include "window_attention.h"

namespace fastpeft {

// The three products of a SiVA layer that have the rank as one side, for some rows of a batch. Rows of the batch are
// float32 or bfloat16, all else is float32. Sums are taken in one order.

constexpr int64_t kRankBlock = 4;  // ranks whose sums share the registers: every number of ranks is a multiple of it

// Some rows of a matrix, wherever they are in it; columns stand side by side.
template <typename T>
struct RowsOf {
    T* data;
    int64_t stride;  // elements from a row to the next
    const int64_t* numbers;
    int64_t count;

    T* row(int64_t m) const { return data + numbers[m] * stride; }
};

// Numbers of some rows that make up a matrix of their own.
struct Rows {
    float* data;
    int64_t stride;
};

// As many rows of length `columns`, without gaps, as there are ranks.
struct Factors {
    const float* data;
    int64_t ranks;
    int64_t columns;
};

// For rows of T.
template <typename T>
struct LowRankOf {
    // coefficients (rows, ranks) = x factors^T, for x (rows, columns)
    void (*project)(RowsOf<T> x, Factors factors, Rows coefficients);
    // out (rows, columns) += coefficients factors, rounded once
    void (*expand)(Rows coefficients, Factors factors, RowsOf<T> out);
    // sums (ranks, columns) += coefficients^T x; sums has no gaps
    void (*reduce)(Rows coefficients, RowsOf<T> x, int64_t ranks, int64_t columns, float* sums);
};

struct LowRank {
    LowRankOf<float> of_float;
    LowRankOf<BFloat16> of_bfloat;
};

// What a pass over one token is made of: a vector against the rows of a matrix. Sums are taken in one order.

// Rows of `columns` numbers side by side, `stride` apart.
struct StridedRows {
    const float* data;
    int64_t count, columns, stride;

    StridedRows some(int64_t begin, int64_t end) const { return {data + begin * stride, end - begin, columns, stride}; }
};

struct VectorProducts {
    // out[i] = x . row i
    void (*dots)(const float* x, StridedRows rows, float* out);
    // out (columns) = the sum of all weights[i] * row i
    void (*combine)(const float* weights, StridedRows rows, float* out);
};

// Numbers of a weight in 8 or 4 bits, as fastpeft/ops/quantise.py makes them.

// out = scale * (what the code stands for), for `count` values of a weight from the flat place `begin` on. Each run of
// `block` values shares a scale. Codes of int8 are numbers; those of nf4, two a byte and the first in its upper half,
// are places in a table.
template <typename T>
using Dequantise = void(const void* codes, const float* scales, int64_t block, int64_t begin, int64_t count, T* out);

struct Dequantisers {
    Dequantise<float>* int8_float;
    Dequantise<BFloat16>* int8_bfloat;
    Dequantise<float>* nf4_float;
    Dequantise<BFloat16>* nf4_bfloat;
};

// What an int8 product needs beside BLAS, for some rows of a batch: activations as integers, sums as numbers.

// How a row x became codes q: x = scale * (q - zero)
struct Quantised {
    float scale;
    int32_t zero;
};

// q (rows, columns) and what it stands for, of x (rows, columns), whose rows lie `stride` elements apart
template <typename T>
using QuantiseRows = void(const T* x, int64_t stride, int64_t rows, int64_t columns, int8_t* q, Quantised* quantised);

// out (rows, columns) = scale[m] * scales[n] * (sums[m, n] - zero[m] * of_codes[n]) + bias[n]; bias may be null
template <typename T>
using ScaleRows = void(const int32_t* sums, const Quantised* quantised, const int32_t* of_codes, const float* scales,
                       const float* bias, int64_t rows, int64_t columns, T* out);

struct Int8 {
    QuantiseRows<float>* quantise_float;
    QuantiseRows<uint16_t>* quantise_bfloat16;  // as its bits
    ScaleRows<float>* scale_float;
    ScaleRows<uint16_t>* scale_bfloat16;
};

// -- variants -----------------------------------------------------------------------------------------------------

struct Variant {
    std::string_view name;
    Perturb* perturb;
    Drop* drop;
    LowRank low_rank;
    Int8 int8;
    Dequantisers dequantisers;
    Passes passes;
    VectorProducts vector_products;
    bool supported = false;
};

namespace baseline {
extern const Variant variant;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Variant variant;
}
namespace avx512 {
extern const Variant variant;
}
namespace avx512bf16 {                      // beside those of avx512, for rows in bfloat16
extern const LowRankOf<BFloat16> low_rank;  // takes subnormal numbers for 0 where it rounds
extern const PassesOf<BFloat16> passes;
}  // namespace avx512bf16
#endif

// Fastest first.
inline std::vector<Variant> variants() {
    std::vector<Variant> found;
    const auto add = [&](Variant variant, bool supported) {
        variant.supported = supported;
        found.push_back(variant);
    };
#if defined(__x86_64__)
    add(avx512::variant, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"));
    add(avx2::variant,
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"));
#endif
    add(baseline::variant, true);
    return found;
}

// The fastest that this processor runs, or the one that FASTPEFT_SIMD names. It is read at every call, so that tests
// and benches compare variants in one process.
inline const Variant& choose_variant() {
    static const std::vector<Variant> all = variants();
    const char* wanted = std::getenv("FASTPEFT_SIMD");
    std::string allowed;
    for (const Variant& variant : all) {
        if (!variant.supported) continue;
        if (wanted == nullptr || wanted == variant.name) return variant;
        allowed.append(allowed.empty() ? "" : ", ").append(variant.name);
    }
    throw std::runtime_error("FASTPEFT_SIMD is '" + std::string(wanted) + "'; allowed on this processor are " +
                             allowed + ". Correct or unset it.");
}

// Are there instructions for bfloat16 beside those of the variant that runs?
inline bool has_bfloat16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") && choose_variant().name == "avx512";
#else
    return false;
#endif
}

}  // namespace fastpeft
