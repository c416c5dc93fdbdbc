// Random words to noise, the same bits as fastpeft/noise.py, which states the contract.
//
// Every addition, multiplication and square root is one float32 operation rounded by itself, in the order written:
// compile with -ffp-contract=off (nvcc: --fmad=false). The coefficients are those of fastpeft/noise.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "bits.h"
#include "philox.h"

namespace fastpeft {

FASTPEFT_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
}

// sqrt(-2 ln u) with u = ((w >> 8) + 1) 2^-24. u = (1 + t) 2^exponent with 1 + t in [sqrt(1/2), sqrt(2));
// ln(1 + t) = t + t^2 P(t).
FASTPEFT_HD float radius(uint32_t word) {
    const float u = static_cast<float>((word >> 8) + 1) * 0x1p-24f;
    const int32_t bits = static_cast<int32_t>(to_bits(u));
    const int32_t exponent = (bits - 0x3F3504F3) >> 23;
    const float t = from_bits(static_cast<uint32_t>(bits - exponent * (1 << 23))) - 1.0f;
    float p = 0x1.645e52p-4f;
    p = p * t + -0x1.242fd0p-3f;
    p = p * t + 0x1.3172fap-3f;
    p = p * t + -0x1.5382a4p-3f;
    p = p * t + 0x1.98d824p-3f;
    p = p * t + -0x1.000380p-2f;
    p = p * t + 0x1.5556d8p-2f;
    p = p * t + -0.5f;
    float logarithm = t + (t * t) * p;
    logarithm = logarithm + static_cast<float>(exponent) * 0x1.62e430p-1f;
    return square_root(logarithm * -2.0f);
}

struct CosSin {
    float cos, sin;
};

// cos(2 pi v) and sin(2 pi v) with v = (w >> 8) 2^-24: the nearest quadrant, and t in [-1, 1) eighths of a turn from
// its middle; sin(pi/4 t) = t P(t^2), cos(pi/4 t) = P(t^2).
FASTPEFT_HD CosSin cos_sin(uint32_t word) {
    const uint32_t turned = (word >> 8) + (1u << 21);
    const uint32_t quadrant = (turned >> 22) & 3u;
    const float t = static_cast<float>(static_cast<int32_t>(turned & 0x3FFFFFu) - (1 << 21)) * 0x1p-21f;
    const float square = t * t;
    float sin = -0x1.33198ep-15f;
    sin = sin * square + 0x1.4680a4p-9f;
    sin = sin * square + -0x1.4abc24p-4f;
    sin = sin * square + 0x1.921fb6p-1f;
    sin = t * sin;
    float cos = -0x1.4eb112p-12f;
    cos = cos * square + 0x1.03b18ep-6f;
    cos = cos * square + -0x1.3bd3a2p-2f;
    cos = cos * square + 1.0f;
    const bool swap = quadrant & 1u;
    const uint32_t cos_bits = to_bits(swap ? sin : cos);
    const uint32_t sin_bits = to_bits(swap ? cos : sin);
    return {from_bits(cos_bits ^ (((quadrant + 1u) & 2u) << 30)), from_bits(sin_bits ^ ((quadrant & 2u) << 30))};
}

struct Lanes {
    float z[4];
};

// z of the flat indices 4q .. 4q + 3 from the words of counter q
FASTPEFT_HD Lanes box_muller(Words words) {
    const float r0 = radius(words.w[0]), r2 = radius(words.w[2]);
    const CosSin a1 = cos_sin(words.w[1]), a3 = cos_sin(words.w[3]);
    return {{r0 * a1.cos, r0 * a1.sin, r2 * a3.cos, r2 * a3.sin}};
}

// +1 or -1 for an even or odd word
FASTPEFT_HD float sign(uint32_t word) { return from_bits(to_bits(1.0f) | word << 31); }

}  // namespace fastpeft
