// Registers of floats, compiled once for each instruction set; the including file defines the macros that
// siva_linear_tile.h explains. Nothing of the standard library is called here.
#pragma once

#include <cstdint>
#include <cstring>

#include "storage.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

typedef float Float __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));
typedef uint32_t Word __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));
typedef int32_t Signed __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));
typedef uint16_t Half __attribute__((vector_size(FASTPEFT_VECTOR_BYTES / 2)));

constexpr int kLanes = FASTPEFT_VECTOR_BYTES / sizeof(float);

FASTPEFT_TARGET inline Float multiply_add(Float a, Float b, Float c) {
#if FASTPEFT_VECTOR_BYTES == 64
    return (Float)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FASTPEFT_VECTOR_BYTES == 32
    return (Float)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Float)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

FASTPEFT_TARGET inline Float broadcast(float x) { return x - Float{}; }  // not +, which would make 0 of -0

// A register, or its first `count` lanes with zeros after them
FASTPEFT_TARGET inline Float load(const float* from, int count = kLanes) {
    Float x = {};
    if (count == kLanes) {
        std::memcpy(&x, from, sizeof x);
    } else {
        std::memcpy(&x, from, count * sizeof(float));
    }
    return x;
}

FASTPEFT_TARGET inline void store(Float x, float* to, int count = kLanes) {
    if (count == kLanes) {
        std::memcpy(to, &x, sizeof x);
    } else {
        std::memcpy(to, &x, count * sizeof(float));
    }
}

FASTPEFT_TARGET inline Float load(const BFloat16* from, int count = kLanes) {
    Half x = {};
    if (count == kLanes) {
        std::memcpy(&x, from, sizeof x);
    } else {
        std::memcpy(&x, from, count * sizeof(BFloat16));
    }
    return (Float)(__builtin_convertvector(x, Word) << 16);
}

// to the nearest, of two to the even one; NaN, which the sum could carry over to infinity, becomes the quiet one
FASTPEFT_TARGET inline void store(Float x, BFloat16* to, int count = kLanes) {
#if defined(FASTPEFT_BFLOAT16)
    const Half half = (Half)_mm512_cvtneps_pbh((__m512)x);
#else
    const Word bits = (Word)x, is_nan = (Word)(x != x);
    const Word rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const Half half = __builtin_convertvector(((rounded & ~is_nan) | (0x7fc00000 & is_nan)) >> 16, Half);
#endif
    if (count == kLanes) {
        std::memcpy(to, &half, sizeof half);
    } else {
        std::memcpy(to, &half, count * sizeof(BFloat16));
    }
}

FASTPEFT_TARGET inline float sum_of_lanes(Float x) {
    float lane[kLanes];
    std::memcpy(lane, &x, sizeof lane);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    }
    return lane[0];
}

}  // namespace
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
