// What a pass over one token is made of, and the instruction sets that it is compiled for: a vector against the rows of
// a matrix. Sums are taken in one order.
#pragma once

#include <cstdint>

namespace fastpeft {

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

namespace baseline {
extern const VectorProducts vector_products;
}
#if defined(__x86_64__)
namespace avx2 {
extern const VectorProducts vector_products;
}
namespace avx512 {
extern const VectorProducts vector_products;
}
#endif

}  // namespace fastpeft
