// The three products of a SiVA layer that have the rank as one side, for some rows of a batch, and the instruction sets
// they are compiled for. All numbers are float32, sums start from zero and are taken in one order.
#pragma once

#include <cstdint>

namespace fastpeft {

constexpr int64_t kRankBlock = 4;  // ranks whose sums share the registers: every number of ranks is a multiple of it

// Some consecutive rows of a matrix; columns stand side by side.
struct Rows {
    float* data;
    int64_t count;
    int64_t stride;  // elements from a row to the next
};

// As many rows of length `columns`, without gaps, as there are ranks.
struct Factors {
    const float* data;
    int64_t ranks;
    int64_t columns;
};

// coefficients (rows, ranks) = x factors^T, for x (rows, columns)
using Project = void(Rows x, Factors factors, Rows coefficients);

// out (rows, columns) = start + coefficients factors; start is (columns,), none is zero
using Expand = void(Rows coefficients, Factors factors, const float* start, Rows out);

// sums (ranks, columns) += coefficients^T x; sums has no gaps
using Reduce = void(Rows coefficients, Rows x, int64_t ranks, int64_t columns, float* sums);

struct LowRank {
    Project* project;
    Expand* expand;
    Reduce* reduce;
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
#endif

}  // namespace fastpeft
