// The loops of csrc/cpu/int8_linear_rows.h by every instruction set against the formula in double, on buffers as large
// as what they hold.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/variants.h"

namespace {

using namespace fastpeft;

float widen(float x) { return x; }

float widen(uint16_t x) {  // bfloat16
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T>
T number(float x) {
    if constexpr (sizeof(T) == sizeof(float)) {
        return x;
    } else {
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return static_cast<T>(bits >> 16);
    }
}

// Whether every code is that of its value, and every output that of its sum, to the rounding of T.
template <typename T>
bool is_right(QuantiseRows<T>* quantise, ScaleRows<T>* scale, int64_t rows, int64_t columns) {
    std::vector<T> x;
    for (int64_t i = 0; i < rows * columns; ++i) x.push_back(number<T>(std::sin(0.7f * i) * (1 + i % 3) + 0.2f));
    std::vector<int8_t> q(x.size());
    std::vector<Quantised> quantised(rows);
    quantise(x.data(), columns, rows, columns, q.data(), quantised.data());
    for (int64_t i = 0; i < rows * columns; ++i) {
        const Quantised& of_row = quantised[i / columns];
        if (std::abs(of_row.scale * (q[i] - of_row.zero) - widen(x[i])) > 0.51 * of_row.scale) return false;
    }
    std::vector<int32_t> sums, of_codes;
    std::vector<float> scales, bias;
    for (int64_t i = 0; i < rows * columns; ++i) sums.push_back(static_cast<int32_t>(i * 7919 % 100000) - 50000);
    for (int64_t n = 0; n < columns; ++n) {
        of_codes.push_back(static_cast<int32_t>(n) - 3);
        scales.push_back(0.01f * (n + 1));
        bias.push_back(0.5f * n);
    }
    for (const float* start : {static_cast<const float*>(bias.data()), static_cast<const float*>(nullptr)}) {
        std::vector<T> out(x.size());
        scale(sums.data(), quantised.data(), of_codes.data(), scales.data(), start, rows, columns, out.data());
        for (int64_t i = 0; i < rows * columns; ++i) {
            const Quantised& of_row = quantised[i / columns];
            const int64_t n = i % columns;
            const double exact = double(of_row.scale) * scales[n] * (double(sums[i]) - of_row.zero * of_codes[n]) +
                                 (start == nullptr ? 0.0 : start[n]);
            const double tolerance = sizeof(T) == 2 ? 0.004 : 1e-6;
            if (std::abs(widen(out[i]) - exact) > tolerance * (std::abs(exact) + 1)) return false;
        }
    }
    return true;
}

}  // namespace

int int8_failures() {
    int failures = 0;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        const Int8& loops = variant.int8;
        for (int64_t rows : {0, 1, 3}) {
            for (int64_t columns : {1, 15, 16, 17, 33, 130}) {
                if (is_right<float>(loops.quantise_float, loops.scale_float, rows, columns) &&
                    is_right<uint16_t>(loops.quantise_bfloat16, loops.scale_bfloat16, rows, columns))
                    continue;
                ++failures;
                std::fprintf(stderr, "failed: %s: int8, %d rows, %d columns\n", std::string(variant.name).c_str(),
                             static_cast<int>(rows), static_cast<int>(columns));
            }
        }
    }
    return failures;
}
