// The passes over one tile, compiled once for each instruction set: the including file defines
//
//     FASTPEFT_ISA            the namespace that this copy lives in
//     FASTPEFT_TARGET         the attribute that makes the compiler use the instruction set ("" for its default)
//     FASTPEFT_VECTOR_BYTES   the width of its registers
//
// The noise is written with vectors, in several independent chains: a chain of dependent operations by itself leaves
// most of a processor idle. Loops over the scalar functions of storage.h are left to the compiler, which vectorises
// them. Every lane computes what the scalar code does, so the bits are the same. Nothing of the standard library is
// called here: a copy of one of its functions, compiled for a newer processor, could end up in the code for all.
#include <cstring>

#include "feature_dropout.h"
#include "mezo_perturb.h"
#include "normal.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace mezo_perturb {
namespace {

using fastpeft::load, fastpeft::store;  // of one number, not of registers

constexpr int kBlock = 256;                      // elements whose noise exists at one time
constexpr int kCounters = kBlock / 4;            // of words: a counter is four elements
constexpr int kAhead = 2 * kBlock;               // elements between those that change and those that are fetched
constexpr int kSignCounters = kNoiseTile / 128;  // Rademacher: a counter is 128 elements

typedef uint64_t Wide __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));
typedef uint32_t Word __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));
typedef int32_t Signed __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));
typedef float Float __attribute__((vector_size(FASTPEFT_VECTOR_BYTES)));

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

// The upper halves of 64-bit lanes in the lower ones, and anything above. On x86 by a shuffle: shifts would compete
// with the multiplications.
FASTPEFT_TARGET inline Wide upper(Wide a) {
#if FASTPEFT_VECTOR_BYTES == 64
    return (Wide)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_DDBB);
#elif FASTPEFT_VECTOR_BYTES == 32
    return (Wide)_mm256_shuffle_epi32((__m256i)a, 0xF5);
#elif defined(__x86_64__)
    return (Wide)_mm_shuffle_epi32((__m128i)a, 0xF5);
#else
    return a >> 32;
#endif
}

// a ^ b ^ c where `a` comes last: compilers reorder, and would make the chain through `a` an operation longer. AVX-512
// has one instruction for both.
FASTPEFT_TARGET inline Wide xor_late(Wide a, Wide b, Wide c) {
    Wide early = b ^ c;
#if defined(__x86_64__) && FASTPEFT_VECTOR_BYTES < 64
    asm("" : "+x"(early));
#endif
    return a ^ early;
}

// The lower halves of 64-bit lanes side by side: in each group of 128 bits two of `a`, then two of `b`.
FASTPEFT_TARGET inline Word lower(Wide a, Wide b) {
#if FASTPEFT_VECTOR_BYTES == 64
    return (Word)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
#elif FASTPEFT_VECTOR_BYTES == 32
    return (Word)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
#else
    return Word{(uint32_t)a[0], (uint32_t)a[1], (uint32_t)b[0], (uint32_t)b[1]};
#endif
}

// Where among the 32-bit lanes of its register the counter is that comes `index`-th: the four lanes of a 128-bit group
// are as many counters apart as the register has groups. Transposing, which stays within groups, then brings a
// counter's words together and the counters into order. With one group this is the natural order.
constexpr int kLanes = FASTPEFT_VECTOR_BYTES / 4, kGroups = kLanes / 4;
constexpr int place(int index) {
    const int within = index % kLanes;
    return index - within + within % kGroups * 4 + within / kGroups;
}

// Philox's words for one seed and ordinal, and for counters whose upper half is that of `q`.
//
// A 64-bit lane holds a counter's word in its lower half, and above it what an operation left there and the next one
// ignores; so a register's worth of counters is two chains. What the first rounds compute from numbers that all
// counters share is computed once.
template <Stream stream>
class Generator {
  public:
    FASTPEFT_TARGET Generator(uint64_t q, uint64_t seed, uint32_t ordinal = 0) {
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < kRounds; ++round) {
            key0_[round] = Wide{} + k0;
            key1_[round] = Wide{} + k1;
            k0 += kWeyl0;
            k1 += kWeyl1;
        }
        key1_[0] ^= Wide{} + ordinal;
        // of round 0, whose first product alone differs from counter to counter
        const uint64_t product = uint64_t{kMultiplier1} * stream;
        const Wide word0 = key0_[0] ^ ((product >> 32) ^ (q >> 32));
        // of round 1, whose second alone does
        word3_ = multiply(word0, Wide{} + kMultiplier0);
        word2_ = upper(word3_) ^ key1_[1];
        key0_[1] ^= Wide{} + product;
    }

    // Word k of counter q + i to words[k][place(i)]; q is a multiple of count.
    template <int count>
    FASTPEFT_TARGET inline void draw(uint64_t q, uint32_t (&words)[4][count]) const {
        static_assert(count % kLanes == 0, "whole registers");
        Wide offset[2] = {};
        for (int i = 0; i < kLanes; ++i) offset[place(i) % 4 / 2][place(i) / 4 * 2 + place(i) % 2] = i;
        const Wide multiplier0 = Wide{} + kMultiplier0, multiplier1 = Wide{} + kMultiplier1;
        for (int i = 0; i < count; i += kLanes) {
            Wide c[2][4];  // more than two chains do not fit into 16 registers: the processor joins iterations itself
            for (int chain = 0; chain < 2; ++chain) {
                const Wide product0 = multiply(offset[chain] + (static_cast<uint32_t>(q) + i), multiplier0);
                const Wide product1 = multiply(upper(product0) ^ key1_[0], multiplier1);
                c[chain][0] = upper(product1) ^ key0_[1];
                c[chain][1] = product1;
                c[chain][2] = word2_ ^ product0;
                c[chain][3] = word3_;
            }
            for (int round = 2; round < kRounds; ++round) {
                for (auto& word : c) {
                    const Wide product0 = multiply(word[0], multiplier0), product1 = multiply(word[2], multiplier1);
                    word[0] = xor_late(upper(product1), word[1], key0_[round]);
                    word[1] = product1;
                    word[2] = xor_late(upper(product0), word[3], key1_[round]);
                    word[3] = product0;
                }
            }
            for (int k = 0; k < 4; ++k) {
                const Word word = lower(c[0][k], c[1][k]);
                std::memcpy(&words[k][i], &word, sizeof word);
            }
        }
    }

  private:
    static constexpr int kRounds = rounds_of(stream);

    Wide key0_[kRounds], key1_[kRounds];
    Wide word2_, word3_;  // after round 1, the first without the counter's part
};

// Of each 128-bit group the four lanes of four registers, transposed.
FASTPEFT_TARGET inline void transpose(Word (&rows)[4]) {
#if defined(__x86_64__)
#if FASTPEFT_VECTOR_BYTES == 64
#define FASTPEFT_UNPACK(half, bits, a, b) (Word) _mm512_unpack##half##_epi##bits((__m512i)(a), (__m512i)(b))
#elif FASTPEFT_VECTOR_BYTES == 32
#define FASTPEFT_UNPACK(half, bits, a, b) (Word) _mm256_unpack##half##_epi##bits((__m256i)(a), (__m256i)(b))
#else
#define FASTPEFT_UNPACK(half, bits, a, b) (Word) _mm_unpack##half##_epi##bits((__m128i)(a), (__m128i)(b))
#endif
    const Word low[] = {FASTPEFT_UNPACK(lo, 32, rows[0], rows[1]), FASTPEFT_UNPACK(lo, 32, rows[2], rows[3])};
    const Word high[] = {FASTPEFT_UNPACK(hi, 32, rows[0], rows[1]), FASTPEFT_UNPACK(hi, 32, rows[2], rows[3])};
    rows[0] = FASTPEFT_UNPACK(lo, 64, low[0], low[1]);
    rows[1] = FASTPEFT_UNPACK(hi, 64, low[0], low[1]);
    rows[2] = FASTPEFT_UNPACK(lo, 64, high[0], high[1]);
    rows[3] = FASTPEFT_UNPACK(hi, 64, high[0], high[1]);
#undef FASTPEFT_UNPACK
#else
    const Word before[] = {rows[0], rows[1], rows[2], rows[3]};
    for (int i = 0; i < kLanes; ++i) {
        for (int k = 0; k < 4; ++k) rows[i % 4][i / 4 * 4 + k] = before[k][i];
    }
#endif
}

// Of each 128-bit group the one of `a`, then the one of `b`, in two registers.
FASTPEFT_TARGET inline void join(Word a, Word b, float* out) {
#if FASTPEFT_VECTOR_BYTES == 64
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const Word joined[] = {(Word)_mm512_permutex2var_epi64((__m512i)a, first, (__m512i)b),
                           (Word)_mm512_permutex2var_epi64((__m512i)a, second, (__m512i)b)};
#elif FASTPEFT_VECTOR_BYTES == 32
    const Word joined[] = {(Word)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x20),
                           (Word)_mm256_permute2x128_si256((__m256i)a, (__m256i)b, 0x31)};
#else
    const Word joined[] = {a, b};
#endif
    std::memcpy(out, joined, sizeof joined);
}

// x of the halves in the upper 16 bits of words
FASTPEFT_TARGET inline Float bent_halves(Word halves) {
    const Float g = __builtin_convertvector((Signed)(halves | kMiddle), Float);
    return bent(g, (Float)((Word)g & kMagnitude));
}

// z of a block; q is its first counter
FASTPEFT_TARGET inline void gaussian(const Generator<kNoise>& generator, uint64_t q, float (&z)[kBlock]) {
    constexpr int kOfBlock = kBlock / kGaussians;
    alignas(64) uint32_t words[4][kOfBlock];
    generator.draw(q, words);
    for (int i = 0; i < kOfBlock; i += kLanes) {
        Float x[kGaussians];
        for (int k = 0; k < 4; ++k) {
            Word word;
            std::memcpy(&word, &words[k][i], sizeof word);
            x[2 * k] = bent_halves(word << 16);
            x[2 * k + 1] = bent_halves(word & kUpperHalf);
        }
        hadamard(x);
        Word first[] = {(Word)x[0], (Word)x[1], (Word)x[2], (Word)x[3]};
        Word last[] = {(Word)x[4], (Word)x[5], (Word)x[6], (Word)x[7]};
        transpose(first);
        transpose(last);
        for (int k = 0; k < 4; ++k) join(first[k], last[k], &z[kGaussians * i + 2 * kLanes * k]);
    }
}

// z of block number `block` of a tile, from the tile's counters
FASTPEFT_TARGET inline void rademacher(const uint32_t (&words)[4][kSignCounters], int block, float (&z)[kBlock]) {
    for (int i = 0; i < kBlock / 32; ++i) {
        const uint32_t word = words[i % 4][place((kBlock / 128) * block + i / 4)];
        for (int bit = 0; bit < 32; ++bit) z[32 * i + bit] = sign(word >> bit);
    }
}

// The words of a block's elements, in their order; q is its first counter
template <Stream stream>
FASTPEFT_TARGET inline void words_in_order(const Generator<stream>& generator, uint64_t q,
                                           uint32_t (&ordered)[kBlock]) {
    alignas(64) uint32_t words[4][kCounters];
    generator.draw(q, words);
    for (int i = 0; i < kCounters; i += kLanes) {
        Word rows[4];
        for (int k = 0; k < 4; ++k) std::memcpy(&rows[k], &words[k][i], sizeof rows[k]);
        transpose(rows);
        std::memcpy(&ordered[4 * i], rows, sizeof rows);
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

#if FASTPEFT_VECTOR_BYTES > 16
// These x86 processors convert float16 themselves.
template <>
FASTPEFT_TARGET void load_block(const Float16* from, int count, float* to) {
    int e = 0;
    for (; e + kLanes <= count; e += kLanes) {
#if FASTPEFT_VECTOR_BYTES == 64
        _mm512_storeu_ps(to + e, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + e))));
#else
        _mm256_storeu_ps(to + e, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + e))));
#endif
    }
    for (; e < count; ++e) to[e] = load(from[e]);
}

template <>
FASTPEFT_TARGET void store_block(const float* from, int count, Float16* to) {
    int e = 0;
    for (; e + kLanes <= count; e += kLanes) {
#if FASTPEFT_VECTOR_BYTES == 64
        const __m256i nearest = _mm512_cvtps_ph(_mm512_loadu_ps(from + e), _MM_FROUND_TO_NEAREST_INT);
#else
        const __m128i nearest = _mm256_cvtps_ph(_mm256_loadu_ps(from + e), _MM_FROUND_TO_NEAREST_INT);
#endif
        std::memcpy(to + e, &nearest, sizeof nearest);
    }
    for (; e < count; ++e) to[e] = store<Float16>(from[e]);
}

#endif

#if FASTPEFT_VECTOR_BYTES == 32
// Packing two registers at a time, which compilers do not find. Any NaN for a NaN: a carry could make it a number.
template <>
FASTPEFT_TARGET void store_block(const float* from, int count, BFloat16* to) {
    int e = 0;
    for (; e + 2 * kLanes <= count; e += 2 * kLanes) {
        Word nearest[2];
        for (int half = 0; half < 2; ++half) {
            Float x;
            std::memcpy(&x, from + e + half * kLanes, sizeof x);
            const Word bits = (Word)x, nan = (Word)(x != x);
            nearest[half] = ((bits + (0x7FFFu + ((bits >> 16) & 1u))) | nan) >> 16;
        }
        const __m256i grouped = _mm256_packus_epi32((__m256i)nearest[0], (__m256i)nearest[1]);
        const __m256i in_order = _mm256_permute4x64_epi64(grouped, 0xD8);
        std::memcpy(to + e, &in_order, sizeof in_order);
    }
    for (; e < count; ++e) to[e] = store<BFloat16>(from[e]);
}
#endif

// Begin to bring a block into the cache. Making noise takes longer than the processor looks ahead, so that by itself it
// would wait for memory after each block. There need be nothing at that address.
template <typename T>
FASTPEFT_TARGET inline void fetch(const T* block) {
    constexpr int kLine = 64 / sizeof(T);
    for (int e = 0; e < kBlock; e += kLine) __builtin_prefetch(block + e, 1);
}

// The elements of the flat indices first .. end - 1, which lie in one tile.
template <typename T, bool is_rademacher, bool is_stochastic>
FASTPEFT_TARGET void perturb_tile(T* __restrict p, uint64_t first, uint64_t end, const Change& change) {
    const uint64_t tile = first / kNoiseTile * kNoiseTile;
    const int first_block = (first - tile) / kBlock, last_block = (end - 1 - tile) / kBlock;
    alignas(64) uint32_t signs[4][kSignCounters], rounding[kBlock];
    alignas(64) float z[kBlock];
    [[maybe_unused]] alignas(64) float widened[kBlock];
    constexpr bool kHalf = sizeof(T) == 2;
    for (size_t i = 0; i < change.num_terms; ++i) {
        const Term term = change.terms[i];
        const compute_t<T> scale = static_cast<compute_t<T>>(term.scale), keep = static_cast<compute_t<T>>(term.keep);
        const uint64_t counter = tile / (is_rademacher ? 128 : kGaussians);
        const Generator<kNoise> noise(counter, term.seed);
        const Generator<kRounding> of_rounding(tile / 4, term.seed);
        if constexpr (is_rademacher) noise.draw(counter, signs);
        for (int block = first_block; block <= last_block; ++block) {
            const uint64_t start = tile + kBlock * block;
            fetch(p + (start + kAhead - first));
            if constexpr (is_rademacher) {
                rademacher(signs, block, z);
            } else {
                gaussian(noise, start / kGaussians, z);
            }
            if constexpr (is_stochastic) words_in_order(of_rounding, start / 4, rounding);
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
        const uint64_t next = first / kNoiseTile * kNoiseTile + kNoiseTile, stop = next < end ? next : end;
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

template <typename T>
FASTPEFT_TARGET void drop_as(void* x, uint64_t first, uint64_t count, const Dropout& dropout) {
    T* __restrict elements = static_cast<T*>(x);
    const T scale = static_cast<T>(dropout.scale);
    alignas(64) uint32_t words[kBlock];
    for (const uint64_t end = first + count; first < end;) {
        const uint64_t start = first / kBlock * kBlock, stop = start + kBlock < end ? start + kBlock : end;
        words_in_order(Generator<kDropout>(start / 4, dropout.seed, dropout.ordinal), start / 4, words);
        const uint32_t* __restrict word = words + (first - start);
        const int length = stop - first;
        for (int e = 0; e < length; ++e) elements[e] *= word[e] >= dropout.threshold ? scale : T{0};
        elements += length;
        first = stop;
    }
}

}  // namespace

FASTPEFT_TARGET void drop(void* x, Format format, uint64_t first, uint64_t count, const Dropout& dropout) {
    return format == Format::kFloat64 ? drop_as<double>(x, first, count, dropout)
                                      : drop_as<float>(x, first, count, dropout);
}

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

}  // namespace mezo_perturb
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
