// The three products of a SiVA layer that have the rank as one side, for some rows of a batch, and the instruction sets
// they are compiled for. Rows of the batch are float32 or bfloat16, all else is float32. Sums are taken in one order.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fastpeft {

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

namespace baseline {
extern const LowRank low_rank;
}
#if defined(__x86_64__)
namespace avx2 {
extern const LowRank low_rank;
}
namespace avx512 {
extern const LowRank low_rank;
}
namespace avx512bf16 {
extern const LowRankOf<BFloat16> low_rank;  // takes subnormal numbers for 0 where it rounds
}
#endif

}  // namespace fastpeft
