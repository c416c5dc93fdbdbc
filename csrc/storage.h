// The formats that parameters are stored in: to and from float32 or float64, and stochastic rounding, the same bits as
// PyTorch's casts and as fastpeft/ops/noise.py. Plain integer and float32 arithmetic without branches, so that loops
// over it vectorise, and without float32 subnormals, which some processors handle slowly.
#pragma once

#include <cstdint>
#include <type_traits>

#include "bits.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace fastpeft {

enum class Format { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

// float16 and bfloat16 are computed in float32
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr uint32_t kSign = 0x80000000u, kMagnitude = 0x7FFFFFFFu, kInfinity = 0x7F800000u;

FASTPEFT_HD bool is_finite(float x) { return (to_bits(x) & kInfinity) != kInfinity; }

FASTPEFT_HD float load(float x) { return x; }

FASTPEFT_HD double load(double x) { return x; }

FASTPEFT_HD float load(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

FASTPEFT_HD float load(Float16 x) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(x.bits));
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t moved = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;  // exponent and fraction in float32's places
    const float normal = from_bits(moved + (112u << 23));                  // the bias is 127 where it was 15
    const float subnormal = from_bits(moved + (113u << 23)) - 0x1p-14f;    // 2^-14 (1 + fraction) less 2^-14
    const float special = from_bits(moved | kInfinity);
    const float magnitude = moved < (1u << 23) ? subnormal : moved >= (31u << 23) ? special : normal;
    return from_bits(to_bits(magnitude) | sign);
#endif
}

// To nearest, ties to even.
template <typename T>
FASTPEFT_HD T store(compute_t<T> x);

template <>
FASTPEFT_HD float store<float>(float x) {
    return x;
}

template <>
FASTPEFT_HD double store<double>(double x) {
    return x;
}

template <>
FASTPEFT_HD BFloat16 store<BFloat16>(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet = (bits >> 16) | 0x40u;  // a NaN stays one
    return {static_cast<uint16_t>((bits & kMagnitude) > kInfinity ? quiet : nearest)};
}

template <>
FASTPEFT_HD Float16 store<Float16>(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#else
    const uint32_t sign = (to_bits(x) & kSign) >> 16;
    const uint32_t bits = to_bits(x) & kMagnitude;
    const uint32_t rounded = bits + 0xFFFu + ((bits >> 13) & 1u);  // 13 bits are dropped
    const uint32_t normal = (rounded - (112u << 23)) >> 13;
    // a float32 from 0.5 on has the spacing of float16's subnormals, 2^-24: the sum rounds as they do
    const uint32_t subnormal = to_bits(from_bits(bits) + 0.5f) - to_bits(0.5f);
    const uint32_t infinity = 0x7C00u, nan = 0x7E00u;
    const uint32_t large = bits > kInfinity ? nan : infinity;
    const uint32_t magnitude = bits < (113u << 23) ? subnormal : rounded >= (143u << 23) ? large : normal;
    return {static_cast<uint16_t>(magnitude | sign)};
#endif
}

// Stochastic rounding: add the word as a fraction of the storage format's spacing to the magnitude, then truncate.
// The result is exact in the storage format (or rounds to its infinity). Infinities and NaN pass; float32 and float64
// are stored as computed.
FASTPEFT_HD float truncate_after_adding(float x, uint32_t word, int dropped_bits) {
    const uint32_t bits = to_bits(x) + (word >> (32 - dropped_bits));
    return from_bits(bits >> dropped_bits << dropped_bits);
}

template <typename T>
FASTPEFT_HD compute_t<T> round_stochastic(compute_t<T> x, uint32_t) {
    return x;
}

template <>
FASTPEFT_HD float round_stochastic<BFloat16>(float x, uint32_t word) {
    return is_finite(x) ? truncate_after_adding(x, word, 16) : x;
}

template <>
FASTPEFT_HD float round_stochastic<Float16>(float x, uint32_t word) {
    // below the smallest normal number, 2^-14, the spacing is 2^-24 throughout: a whole number of these and a fraction
    // of 32 bits, by conversions to signed integers alone, which every vector unit has
    const float magnitude = from_bits(to_bits(x) & kMagnitude);
    const bool small = magnitude < 0x1p-14f;
    const float units = (small ? magnitude : 0.0f) * 0x1p24f;
    const int32_t whole = static_cast<int32_t>(units);
    const float upper = (units - static_cast<float>(whole)) * 0x1p16f;
    const float lower = (upper - static_cast<float>(static_cast<int32_t>(upper))) * 0x1p16f;
    const uint32_t fraction =
        static_cast<uint32_t>(static_cast<int32_t>(upper)) << 16 | static_cast<uint32_t>(static_cast<int32_t>(lower));
    const uint32_t carry = fraction > ~word ? 1u : 0u;
    const float rounded = static_cast<float>(whole + static_cast<int32_t>(carry)) * 0x1p-24f;
    const float of_small = from_bits(to_bits(rounded) | (to_bits(x) & kSign));
    const float of_normal = is_finite(x) ? truncate_after_adding(x, word, 13) : x;
    return small ? of_small : of_normal;
}

}  // namespace fastpeft
