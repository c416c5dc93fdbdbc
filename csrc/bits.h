// A float32 and its bit pattern, and how functions are declared that host and device code share.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined on the host, and compiled for the instruction set of the including file, which may name one in
// FASTPEFT_TARGET.
#if defined(__CUDACC__)
#define FASTPEFT_HD __host__ __device__ __forceinline__
#else
#if !defined(FASTPEFT_TARGET)
#define FASTPEFT_TARGET
#endif
#define FASTPEFT_HD FASTPEFT_TARGET __attribute__((always_inline)) inline
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
