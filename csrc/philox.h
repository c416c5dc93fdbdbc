// Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), and how this library counts:
// counter (lo32(q), hi32(q), stream, ordinal), key (lo32(seed), hi32(seed)). One counter q makes four words. The noise
// takes the 7 rounds that pass BigCrush, other streams the 10 that the authors recommend.
//
// Shared by host and device code: no state, no memory, nothing but integer arithmetic.
#pragma once

#include <cstdint>

#include "bits.h"

namespace fastpeft {

enum Stream : uint32_t { kNoise = 0, kRounding = 1 };

FASTPEFT_HD constexpr int rounds_of(Stream stream) { return stream == kNoise ? 7 : 10; }

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;

struct Words {
    uint32_t w[4];
};

// By its instruction on a GPU: the assembler of CUDA 13.0 otherwise adds the product of the upper halves, which is 0.
FASTPEFT_HD uint64_t product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint64_t wide;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(wide) : "r"(a), "r"(b));
    return wide;
#else
    return uint64_t{a} * b;
#endif
}

FASTPEFT_HD Words philox4x32(Words counter, uint32_t key0, uint32_t key1, int rounds) {
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
    for (int round = 0; round < rounds; ++round) {
        const uint64_t product0 = product(kMultiplier0, counter.w[0]);
        const uint64_t product1 = product(kMultiplier1, counter.w[2]);
        counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.w[1] ^ key0, static_cast<uint32_t>(product1),
                    static_cast<uint32_t>(product0 >> 32) ^ counter.w[3] ^ key1, static_cast<uint32_t>(product0)}};
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return counter;
}

FASTPEFT_HD Words random_words(uint64_t q, uint64_t seed, Stream stream, uint32_t ordinal = 0) {
    const Words counter = {{static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), stream, ordinal}};
    return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), rounds_of(stream));
}

}  // namespace fastpeft
