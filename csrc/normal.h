// Random words to noise, the same bits as fastpeft/ops/noise.py, which states the contract.
//
// Every addition and multiplication is one float32 operation rounded by itself, in the order written: compile with
// -ffp-contract=off (nvcc: --fmad=false). What takes a Float takes a float, or a vector of many.
#pragma once

#include <math.h>

#include <cstdint>

#include "bits.h"
#include "philox.h"

namespace fastpeft {

constexpr int kGaussians = 8;  // of one counter

// The halves of a word, each in the upper 16 bits of a signed number, with its middle below: never 0, and -h is as
// likely as h.
constexpr uint32_t kMiddle = 0x8000u, kUpperHalf = 0xFFFF0000u;

// x = g (|g| A + B)^2 of g, a uniform number in (-2^31, 2^31): the moments of x are those that give z its own
template <typename Float>
FASTPEFT_HD Float bent(Float g, Float magnitude) {
    Float s = magnitude * 0x1.1e301cp-45f + -0x1.83b82ep-15f;
    s = s * s;
    return s * g;
}

// Lane l becomes the sum of (-1)^popcount(j & l) x_j.
template <typename Float>
FASTPEFT_HD void hadamard(Float (&x)[kGaussians]) {
    for (int apart = 1; apart < kGaussians; apart *= 2) {
        for (int i = 0; i < kGaussians; ++i) {
            if (i & apart) continue;
            const Float a = x[i], b = x[i + apart];
            x[i] = a + b;
            x[i + apart] = a - b;
        }
    }
}

struct Lanes {
    float z[kGaussians];
};

FASTPEFT_HD float bent_half(uint32_t half) {
    const float g = static_cast<float>(static_cast<int32_t>(half | kMiddle));  // exact
    return bent(g, fabsf(g));
}

// z of the flat indices 8q .. 8q + 7 from the words of counter q
FASTPEFT_HD Lanes gaussian(Words words) {
    Lanes lanes;
    for (int k = 0; k < 4; ++k) {
        lanes.z[2 * k] = bent_half(words.w[k] << 16);
        lanes.z[2 * k + 1] = bent_half(words.w[k] & kUpperHalf);
    }
    hadamard(lanes.z);
    return lanes;
}

// +1 or -1 for an even or odd word
FASTPEFT_HD float sign(uint32_t word) { return from_bits(to_bits(1.0f) | word << 31); }

}  // namespace fastpeft
