// Random words to noise, the same bits as fastpeft/noise.py, which states the contract.
//
// Every addition, multiplication and square root is one float32 operation rounded by itself, in the order written:
// compile with -ffp-contract=off (nvcc: --fmad=false). The coefficients are those of fastpeft/noise.py, some times a
// power of two, which rounds nothing.
//
// A Word is a uint32_t, or a type of many that has its operators and the functions up to `select`.
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

// of the word as a signed number
FASTPEFT_HD float to_float(uint32_t word) { return static_cast<float>(static_cast<int32_t>(word)); }

// one or the other number, by the upper bit of the word
FASTPEFT_HD float select(uint32_t word, float set, float clear) { return word >> 31 ? set : clear; }

// sqrt(-2 ln u) with u = ((w >> 8) + 1) 2^-24. u = (1 + t) 2^exponent with 1 + t in [sqrt(1/2), sqrt(2));
// ln(1 + t) = t + t^2 P(t).
template <typename Word>
FASTPEFT_HD auto radius(const Word& word) {
    constexpr uint32_t kRootOfHalf = 0x3F3504F3u, kFraction = 0x7FFFFFu;
    const auto above = to_bits(to_float((word >> 8) + 1u)) - (kRootOfHalf + (24u << 23));  // of 2^24 u
    const auto exponent = to_float(above & ~kFraction);                                    // 2^23 times it
    const auto t = from_bits((above & kFraction) + kRootOfHalf) - 1.0f;
    auto p = t * 0x1.645e52p-4f + -0x1.242fd0p-3f;
    p = p * t + 0x1.3172fap-3f;
    p = p * t + -0x1.5382a4p-3f;
    p = p * t + 0x1.98d824p-3f;
    p = p * t + -0x1.000380p-2f;
    p = p * t + 0x1.5556d8p-2f;
    p = p * t + -0.5f;
    auto logarithm = t + (t * t) * p;
    logarithm = logarithm + exponent * 0x1.62e430p-24f;
    return square_root(logarithm * -2.0f);
}

template <typename Float>
struct CosSin {
    Float cos, sin;
};

// cos(2 pi v) and sin(2 pi v) with v = (w >> 8) 2^-24: the nearest quadrant, and t in [-1, 1) eighths of a turn from
// its middle; sin(pi/4 t) = t P(t^2), cos(pi/4 t) = P(t^2).
template <typename Word>
FASTPEFT_HD auto cos_sin(const Word& word) {
    const auto turned = word + (1u << 29);                                           // the upper two bits: quadrant
    const auto t = from_bits(((turned & 0x3FFFFF00u) >> 7) | to_bits(2.0f)) - 3.0f;  // from a number in [2, 4)
    const auto square = t * t;
    auto sin = square * -0x1.33198ep-15f + 0x1.4680a4p-9f;
    sin = sin * square + -0x1.4abc24p-4f;
    sin = sin * square + 0x1.921fb6p-1f;
    sin = t * sin;
    auto cos = square * -0x1.4eb112p-12f + 0x1.03b18ep-6f;
    cos = cos * square + -0x1.3bd3a2p-2f;
    cos = cos * square + 1.0f;
    constexpr uint32_t kUpper = 1u << 31;
    const auto odd = turned << 1;
    const auto cos_bits = to_bits(select(odd, sin, cos)) ^ ((turned + (1u << 30)) & kUpper);
    const auto sin_bits = to_bits(select(odd, cos, sin)) ^ (turned & kUpper);
    return CosSin<decltype(from_bits(word))>{from_bits(cos_bits), from_bits(sin_bits)};
}

struct Lanes {
    float z[4];
};

// z of the flat indices 4q .. 4q + 3 from the words of counter q
FASTPEFT_HD Lanes box_muller(Words words) {
    const float r0 = radius(words.w[0]), r2 = radius(words.w[2]);
    const CosSin<float> a1 = cos_sin(words.w[1]), a3 = cos_sin(words.w[3]);
    return {{r0 * a1.cos, r0 * a1.sin, r2 * a3.cos, r2 * a3.sin}};
}

// +1 or -1 for an even or odd word
FASTPEFT_HD float sign(uint32_t word) { return from_bits(to_bits(1.0f) | word << 31); }

}  // namespace fastpeft
