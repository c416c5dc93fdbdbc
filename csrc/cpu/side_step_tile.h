// The products of VectorProducts, compiled once for each instruction set; the including file defines the macros
// that siva_linear_tile.h explains. Nothing of the standard library is called here.
#include "variants.h"
#include "vectors.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace side_step {
namespace {

constexpr int kSums = 4;  // rows or registers at a time, whose sums do not wait for each other

template <int kCount>
FASTPEFT_TARGET inline void dots_of(const float* x, StridedRows rows, int64_t first, float* out) {
    const float* row[kCount];
    Float sums[kCount] = {};
    for (int i = 0; i < kCount; ++i) row[i] = rows.data + (first + i) * rows.stride;
    for (int64_t k = 0; k < rows.columns; k += kLanes) {
        const int count = rows.columns - k < kLanes ? rows.columns - k : kLanes;
        const Float value = load(x + k, count);
        for (int i = 0; i < kCount; ++i) sums[i] = multiply_add(value, load(row[i] + k, count), sums[i]);
    }
    for (int i = 0; i < kCount; ++i) out[first + i] = sum_of_lanes(sums[i]);
}

FASTPEFT_TARGET void dots(const float* x, StridedRows rows, float* out) {
    int64_t i = 0;
    for (; i + kSums <= rows.count; i += kSums) dots_of<kSums>(x, rows, i, out);
    for (; i < rows.count; ++i) dots_of<1>(x, rows, i, out);
}

// kCount registers side by side from column n on, the last of them `count` lanes
template <int kCount>
FASTPEFT_TARGET inline void combine_columns(const float* weights, StridedRows rows, int64_t n, int count, float* out) {
    Float sums[kCount] = {};
    for (int64_t i = 0; i < rows.count; ++i) {
        const float* row = rows.data + i * rows.stride + n;
        const Float weight = broadcast(weights[i]);
        for (int c = 0; c < kCount; ++c) sums[c] = multiply_add(weight, load(row + c * kLanes, count), sums[c]);
    }
    for (int c = 0; c < kCount; ++c) store(sums[c], out + n + c * kLanes, count);
}

FASTPEFT_TARGET void combine(const float* weights, StridedRows rows, float* out) {
    int64_t n = 0;
    for (; n + kSums * kLanes <= rows.columns; n += kSums * kLanes) {
        combine_columns<kSums>(weights, rows, n, kLanes, out);
    }
    while (n < rows.columns) {
        const int count = rows.columns - n < kLanes ? rows.columns - n : kLanes;
        combine_columns<1>(weights, rows, n, count, out);
        n += count;
    }
}

}  // namespace

constexpr VectorProducts vector_products = {dots, combine};

}  // namespace side_step
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
