// What an int8 product needs beside BLAS, for some rows of a batch: activations as integers, sums as numbers.
#pragma once

#include <cstdint>

namespace fastpeft {

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

namespace baseline {
extern const Int8 int8;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Int8 int8;
}
namespace avx512 {
extern const Int8 int8;
}
#endif

}  // namespace fastpeft
