// The loops of Dequantisers, compiled once for each instruction set; the including file defines the macros that
// siva_linear_tile.h explains. Nothing of the standard library is called here.
#include "variants.h"
#include "vectors.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace dequantise {
namespace {

// quantiles of a normal distribution, the largest of which is 1 (Dettmers et al. 2023)
alignas(64) constexpr float kNormal[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

// The values of kLanes codes from an even place on
FASTPEFT_TARGET inline Float nf4_at(const uint8_t* bytes) {
#if FASTPEFT_VECTOR_BYTES >= 32
    uint32_t eight[kLanes / 8];
    std::memcpy(eight, bytes, sizeof eight);
#endif
#if FASTPEFT_VECTOR_BYTES == 64
    const Word first = {~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u, ~0u};
    const Word shifts = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24};
    const Word places = ((((Word{} + eight[0]) & first) | ((Word{} + eight[1]) & ~first)) >> shifts) & 15;
    return (Float)_mm512_permutexvar_ps((__m512i)places, _mm512_load_ps(kNormal));
#elif FASTPEFT_VECTOR_BYTES == 32
    const Word shifts = {4, 0, 12, 8, 20, 16, 28, 24};
    const Word places = (Word{} + eight[0]) >> shifts;  // the instructions look at some of the bits
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(kNormal), (__m256i)places);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(kNormal + 8), (__m256i)places);
    return (Float)_mm256_blendv_ps(low, high, (__m256)(places << 28));
#else
    return Float{kNormal[bytes[0] >> 4], kNormal[bytes[0] & 15], kNormal[bytes[1] >> 4], kNormal[bytes[1] & 15]};
#endif
}

FASTPEFT_TARGET inline Float int8_at(const int8_t* codes) {
    Signed numbers;
    for (int i = 0; i < kLanes; ++i) numbers[i] = codes[i];
    return __builtin_convertvector(numbers, Float);
}

// Values of Code, kPerCode to each, of which `at` makes kLanes
template <typename Code, int kPerCode, Float at(const Code*), typename T>
FASTPEFT_TARGET void dequantise(const void* codes, const float* scales, int64_t block, int64_t begin, int64_t count,
                                T* out) {
    const Code* const all = static_cast<const Code*>(codes);
    const int64_t end = begin + count;
    int64_t i = begin, next = begin - begin % block;
    for (scales += begin / block; i < end; ++scales) {
        next += block;
        const int64_t stop = next < end ? next : end;
        const float scale = *scales;
        if (const int odd = static_cast<int>(i % kPerCode)) {  // the second half of a byte
            store(broadcast(kNormal[all[i / kPerCode] & 15] * scale), out, odd);
            out += odd, i += odd;
        }
        for (; i + kLanes <= stop; i += kLanes, out += kLanes) store(at(all + i / kPerCode) * scale, out);
        if (const int rest = static_cast<int>(stop - i)) {  // those after them may not be there
            Code there[kLanes] = {};
            std::memcpy(there, all + i / kPerCode, (rest + kPerCode - 1) / kPerCode * sizeof(Code));
            store(at(there) * scale, out, rest);
            out += rest, i = stop;
        }
    }
}

template <typename T>
constexpr Dequantise<T>* int8 = dequantise<int8_t, 1, int8_at, T>;
template <typename T>
constexpr Dequantise<T>* nf4 = dequantise<uint8_t, 2, nf4_at, T>;

}  // namespace

constexpr Dequantisers dequantisers = {int8<float>, int8<BFloat16>, nf4<float>, nf4<BFloat16>};

}  // namespace dequantise
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
