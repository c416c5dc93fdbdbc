// The loops of Int8, compiled once for each instruction set: the including file defines
//
//     FASTPEFT_ISA      the namespace that this copy lives in
//     FASTPEFT_TARGET   the attribute that makes the compiler use the instruction set ("" for its default)
//
// Vectors are as wide as AVX-512's; the compiler makes several narrower ones of them where there is no such register.
// Nothing of the standard library is called here: a copy of one of its functions, compiled for a newer processor, could
// end up in the code for all.
#include <cstring>

#include "variants.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace int8_linear {
namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Codes __attribute__((vector_size(kLanes)));

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds a small number to a whole one, nearest even
constexpr float kMinRange = 1e-30f;    // a range below which a row is taken for zeros

// Whole vectors, or their first `count` lanes with zeros after them
template <typename V, typename T>
FASTPEFT_TARGET inline V load(const T* from, int64_t count) {
    V x = {};
    if (count >= kLanes) {
        std::memcpy(&x, from, sizeof x);
    } else {
        std::memcpy(&x, from, count * sizeof(T));
    }
    return x;
}

template <typename V, typename T>
FASTPEFT_TARGET inline void store(V x, T* to, int64_t count) {
    if (count >= kLanes) {
        std::memcpy(to, &x, sizeof x);
    } else {
        std::memcpy(to, &x, count * sizeof(T));
    }
}

FASTPEFT_TARGET inline Floats load_floats(const float* from, int64_t count) { return load<Floats>(from, count); }

FASTPEFT_TARGET inline Floats load_floats(const uint16_t* from, int64_t count) {  // bfloat16
    return (Floats)(__builtin_convertvector(load<Halves>(from, count), Words) << 16);
}

FASTPEFT_TARGET inline void store_floats(Floats x, float* to, int64_t count) { store(x, to, count); }

FASTPEFT_TARGET inline void store_floats(Floats x, uint16_t* to, int64_t count) {  // bfloat16, to nearest even
    const Words bits = (Words)x;
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    store(__builtin_convertvector(x == x ? rounded : Words{} + 0x7fc0, Halves), to, count);  // NaN stays NaN
}

FASTPEFT_TARGET inline Floats rounded(Floats x) { return (x + kRound) - kRound; }

template <typename T>
FASTPEFT_TARGET void quantise(const T* x, int64_t stride, int64_t rows, int64_t columns, int8_t* q,
                              Quantised* quantised) {
    for (int64_t m = 0; m < rows; ++m, x += stride, q += columns) {
        Floats low = {}, high = {}, wrong = {};  // 0 is in the range, so that it stays 0
        for (int64_t k = 0; k < columns; k += kLanes) {
            const Floats value = load_floats(x + k, columns - k);
            low = value < low ? value : low;
            high = value > high ? value : high;
            wrong += value - value;  // NaN where it is not finite, which the comparisons would not tell
        }
        for (int i = 1; i < kLanes; ++i) {
            low[0] = low[i] < low[0] ? low[i] : low[0];
            high[0] = high[i] > high[0] ? high[i] : high[0];
            wrong[0] += wrong[i];
        }
        const float range = high[0] - low[0] + wrong[0];
        const float inverse = range > kMinRange ? 255.0f / range : 0.0f;
        const float zero = -128.0f - ((low[0] * inverse + kRound) - kRound);
        *quantised++ = {range <= kMinRange ? 0.0f : range / 255.0f, static_cast<int32_t>(zero)};
        for (int64_t k = 0; k < columns; k += kLanes) {
            Floats code = rounded(load_floats(x + k, columns - k) * inverse) + zero;
            code = code > -128.0f ? code : Floats{} - 128.0f;  // NaN becomes -128
            code = code < 127.0f ? code : Floats{} + 127.0f;
            store(__builtin_convertvector(__builtin_convertvector(code, Ints), Codes), q + k, columns - k);
        }
    }
}

template <typename T>
FASTPEFT_TARGET void scale(const int32_t* sums, const Quantised* quantised, const int32_t* of_codes,
                           const float* scales, const float* bias, int64_t rows, int64_t columns, T* out) {
    for (int64_t m = 0; m < rows; ++m, sums += columns, out += columns) {
        const float of_row = quantised[m].scale;
        const int32_t zero = quantised[m].zero;
        for (int64_t n = 0; n < columns; n += kLanes) {
            const int64_t count = columns - n;
            const Ints sum = load<Ints>(sums + n, count) - zero * load<Ints>(of_codes + n, count);
            Floats value = __builtin_convertvector(sum, Floats) * of_row * load<Floats>(scales + n, count);
            if (bias != nullptr) value += load<Floats>(bias + n, count);
            store_floats(value, out + n, count);
        }
    }
}

}  // namespace

constexpr Int8 int8 = {quantise<float>, quantise<uint16_t>, scale<float>, scale<uint16_t>};

}  // namespace int8_linear
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
