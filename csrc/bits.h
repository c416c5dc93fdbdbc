// A float32 and its bit pattern, and how functions are declared that host and device code share.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined on the host: a loop over these functions is then compiled for the instruction set of its caller.
#if defined(__CUDACC__)
#define FASTPEFT_HD __host__ __device__ __forceinline__
#else
#define FASTPEFT_HD __attribute__((always_inline)) inline
#endif

namespace fastpeft {

FASTPEFT_HD uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

FASTPEFT_HD float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace fastpeft
