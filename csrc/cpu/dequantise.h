// Numbers of a weight in 8 or 4 bits, as fastpeft/ops/quantise.py makes them.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fastpeft {

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

namespace baseline {
extern const Dequantisers dequantisers;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Dequantisers dequantisers;
}
namespace avx512 {
extern const Dequantisers dequantisers;
}
#endif

}  // namespace fastpeft
