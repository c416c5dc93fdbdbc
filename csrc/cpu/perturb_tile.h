// The passes over one tile, compiled once for each instruction set: the including file defines
//
//     FASTPEFT_ISA            the namespace that this copy lives in
//     FASTPEFT_TARGET         the attribute that makes the compiler use the instruction set ("" for its default)
//     FASTPEFT_VECTOR_BYTES   the width of its registers
//
// Loops over the scalar functions of normal.h and storage.h are left to the compiler, which vectorises them; every
// lane computes what the scalar code does, so the bits are the same. Only Philox is written with vectors: compilers
// do not find the instruction that multiplies 32-bit halves of 64-bit lanes. Nothing of the standard library is called
// here: a copy of one of its functions, compiled for a newer processor, could end up in the code for all.
#include <cstring>

#include "normal.h"
#include "perturb.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace {

constexpr int kBlock = 256;                 // elements whose noise exists at one time
constexpr int kCounters = kBlock / 4;       // Gaussian: a counter is four elements
constexpr int kSignCounters = kTile / 128;  // Rademacher: a counter is 128 elements

typedef uint64_t Wide __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));

// The products of the lower halves of 64-bit lanes.
FASTPEFT_TARGET inline Wide multiply(Wide a, Wide b) {
#if FASTPEFT_VECTOR_BYTES == 64
    return (Wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FASTPEFT_VECTOR_BYTES == 32
    return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (Wide)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// Word k of the counters q .. q + count - 1 to words[k]; count is a multiple of the 32-bit lanes of a register.
//
// A 64-bit lane holds a counter's word in its lower half, and above it what the multiplication left there and the next
// one ignores. Even and odd counters are two independent chains, which interleave to 32-bit lanes at the end.
template <int count>
FASTPEFT_TARGET void draw(uint64_t q, uint64_t seed, Stream stream, uint32_t (&words)[4][count]) {
    constexpr int kLanes = FASTPEFT_VECTOR_BYTES / 4;
    static_assert(count % kLanes == 0, "whole registers");
    Wide key0[kRounds], key1[kRounds], even;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round) {
        key0[round] = Wide{} + k0;
        key1[round] = Wide{} + k1;
        k0 += kWeyl0;
        k1 += kWeyl1;
    }
    for (int lane = 0; lane < kLanes / 2; ++lane) even[lane] = 2 * lane;
    const Wide multiplier0 = Wide{} + kMultiplier0, multiplier1 = Wide{} + kMultiplier1;

    for (int i = 0; i < count; i += kLanes) {
        Wide c[2][4];
        for (int odd = 0; odd < 2; ++odd) {
            c[odd][0] = even + (q + i + odd);
            c[odd][1] = c[odd][0] >> 32;
            c[odd][2] = Wide{} + static_cast<uint64_t>(stream);
            c[odd][3] = Wide{};
        }
        for (int round = 0; round < kRounds; ++round) {
            for (auto& counter : c) {
                const Wide product0 = multiply(counter[0], multiplier0), product1 = multiply(counter[2], multiplier1);
                counter[0] = (product1 >> 32) ^ counter[1] ^ key0[round];
                counter[1] = product1;
                counter[2] = (product0 >> 32) ^ counter[3] ^ key1[round];
                counter[3] = product0;
            }
        }
        for (int k = 0; k < 4; ++k) {
            const Wide interleaved = (c[0][k] & 0xFFFFFFFFu) | (c[1][k] << 32);
            std::memcpy(&words[k][i], &interleaved, sizeof interleaved);
        }
    }
}

// z of a block; q is its first counter
FASTPEFT_TARGET inline void gaussian(uint64_t q, uint64_t seed, float (&z)[kBlock]) {
    alignas(64) uint32_t words[4][kCounters];
    draw(q, seed, kNoise, words);
    for (int i = 0; i < kCounters; ++i) {
        const Lanes lanes = box_muller({{words[0][i], words[1][i], words[2][i], words[3][i]}});
        z[4 * i] = lanes.z[0];
        z[4 * i + 1] = lanes.z[1];
        z[4 * i + 2] = lanes.z[2];
        z[4 * i + 3] = lanes.z[3];
    }
}

// z of block number `block` of a tile, from the tile's counters
FASTPEFT_TARGET inline void rademacher(const uint32_t (&words)[4][kSignCounters], int block, float (&z)[kBlock]) {
    for (int i = 0; i < kBlock / 32; ++i) {
        const uint32_t word = words[i % 4][(kBlock / 128) * block + i / 4];
        for (int bit = 0; bit < 32; ++bit) z[32 * i + bit] = sign(word >> bit);
    }
}

// The words that round a block's elements, in their order; q is its first counter
FASTPEFT_TARGET inline void rounding_words(uint64_t q, uint64_t seed, uint32_t (&in_order)[kBlock]) {
    alignas(64) uint32_t words[4][kCounters];
    draw(q, seed, kRounding, words);
    for (int i = 0; i < kCounters; ++i) {
        for (int k = 0; k < 4; ++k) in_order[4 * i + k] = words[k][i];
    }
}

// count half-precision elements to and from float32
template <typename T>
FASTPEFT_TARGET void load_block(const T* from, int count, float* to) {
    for (int e = 0; e < count; ++e) to[e] = load(from[e]);
}

template <typename T>
FASTPEFT_TARGET void store_block(const float* from, int count, T* to) {
    for (int e = 0; e < count; ++e) to[e] = store<T>(from[e]);
}

#if FASTPEFT_VECTOR_BYTES > 16  // these x86 processors convert float16 themselves
template <>
FASTPEFT_TARGET void load_block(const Float16* from, int count, float* to) {
    int e = 0;
    for (; e + 8 <= count; e += 8) {
        _mm256_storeu_ps(to + e, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + e))));
    }
    for (; e < count; ++e) to[e] = load(from[e]);
}

template <>
FASTPEFT_TARGET void store_block(const float* from, int count, Float16* to) {
    int e = 0;
    for (; e + 8 <= count; e += 8) {
        const __m128i nearest = _mm256_cvtps_ph(_mm256_loadu_ps(from + e), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + e), nearest);
    }
    for (; e < count; ++e) to[e] = store<Float16>(from[e]);
}
#endif

// The elements of the flat indices first .. end - 1, which lie in one tile.
template <typename T, bool is_rademacher, bool is_stochastic>
FASTPEFT_TARGET void perturb_tile(T* __restrict p, uint64_t first, uint64_t end, const Change& change) {
    const uint64_t tile = first / kTile * kTile;
    const int first_block = (first - tile) / kBlock, last_block = (end - 1 - tile) / kBlock;
    alignas(64) uint32_t signs[4][kSignCounters], rounding[kBlock];
    alignas(64) float z[kBlock];
    [[maybe_unused]] alignas(64) float widened[kBlock];
    constexpr bool kHalf = sizeof(T) == 2;
    for (size_t i = 0; i < change.num_terms; ++i) {
        const Term term = change.terms[i];
        const compute_t<T> scale = static_cast<compute_t<T>>(term.scale), keep = static_cast<compute_t<T>>(term.keep);
        if constexpr (is_rademacher) draw(tile / 128, term.seed, kNoise, signs);
        for (int block = first_block; block <= last_block; ++block) {
            const uint64_t start = tile + kBlock * block;
            if constexpr (is_rademacher) {
                rademacher(signs, block, z);
            } else {
                gaussian(start / 4, term.seed, z);
            }
            if constexpr (is_stochastic) rounding_words(start / 4, term.seed, rounding);
            const int skipped = start < first ? first - start : 0;
            const int stop = end - start < kBlock ? end - start : kBlock;
            const int count = stop - skipped;
            T* elements = p + (start + skipped - first);
            compute_t<T>* __restrict values;
            if constexpr (kHalf) {
                load_block(elements, count, values = widened);
            } else {
                values = elements;
            }
            for (int e = 0; e < count; ++e) {
                values[e] = values[e] * keep + static_cast<compute_t<T>>(z[skipped + e]) * scale;
                if constexpr (is_stochastic) values[e] = round_stochastic<T>(values[e], rounding[skipped + e]);
            }
            if constexpr (kHalf) store_block(values, count, elements);
        }
    }
}

template <typename T, bool is_rademacher, bool is_stochastic>
FASTPEFT_TARGET void perturb_tiles(T* p, uint64_t first, uint64_t count, const Change& change) {
    for (const uint64_t end = first + count; first < end;) {
        const uint64_t next = first / kTile * kTile + kTile, stop = next < end ? next : end;
        perturb_tile<T, is_rademacher, is_stochastic>(p, first, stop, change);
        p += stop - first;
        first = stop;
    }
}

template <typename T>
FASTPEFT_TARGET void perturb_as(void* p, uint64_t first, uint64_t count, const Change& change) {
    constexpr bool kHalf = sizeof(T) == 2;  // float32 and float64 are stored as computed
    T* elements = static_cast<T*>(p);
    if (change.rademacher) {
        change.stochastic ? perturb_tiles<T, true, kHalf>(elements, first, count, change)
                          : perturb_tiles<T, true, false>(elements, first, count, change);
    } else {
        change.stochastic ? perturb_tiles<T, false, kHalf>(elements, first, count, change)
                          : perturb_tiles<T, false, false>(elements, first, count, change);
    }
}

}  // namespace

FASTPEFT_TARGET void perturb(void* p, Format format, uint64_t first, uint64_t count, const Change& change) {
    switch (format) {
        case Format::kFloat32:
            return perturb_as<float>(p, first, count, change);
        case Format::kFloat64:
            return perturb_as<double>(p, first, count, change);
        case Format::kBFloat16:
            return perturb_as<BFloat16>(p, first, count, change);
        case Format::kFloat16:
            return perturb_as<Float16>(p, first, count, change);
    }
}

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
