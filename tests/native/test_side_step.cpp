// The products of VectorProducts by every instruction set against plain sums in double, on buffers that
// end where the numbers do: a read or write past an end is the sanitizer's to find.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "cpu/variants.h"

namespace {

using namespace fastpeft;

std::vector<float> numbers(int64_t size, int seed) {
    std::vector<float> out;
    for (int64_t i = 0; i < size; ++i) out.push_back(std::sin(static_cast<float>(seed + 7 * i)));
    return out;
}

// The largest error of both products with `count` rows, between each two of which there are two numbers more.
double error_of(const VectorProducts& products, int64_t count, int64_t columns) {
    const int64_t stride = columns + 2;
    const std::vector<float> x = numbers(columns, 1), weights = numbers(count, 2);
    const std::vector<float> room = numbers(count == 0 ? 0 : (count - 1) * stride + columns, 3);
    const StridedRows rows = {room.data(), count, columns, stride};
    std::vector<float> found(count, NAN), sum(columns, NAN);
    products.dots(x.data(), rows, found.data());
    products.combine(weights.data(), rows, sum.data());
    double largest = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        double expected = 0.0;
        for (int64_t k = 0; k < columns; ++k) expected += static_cast<double>(x[k]) * room[i * stride + k];
        largest = std::fmax(largest, std::fabs(found[i] - expected));
        if (std::isnan(found[i])) return INFINITY;
    }
    for (int64_t k = 0; k < columns; ++k) {
        double expected = 0.0;
        for (int64_t i = 0; i < count; ++i) expected += static_cast<double>(weights[i]) * room[i * stride + k];
        largest = std::fmax(largest, std::fabs(sum[k] - expected));
        if (std::isnan(sum[k])) return INFINITY;
    }
    return largest;
}

}  // namespace

int side_step_failures() {
    int failures = 0;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        for (int64_t count : {0, 1, 3, 4, 5, 9, 64}) {
            for (int64_t columns : {0, 1, 7, 15, 17, 63, 65, 130}) {
                const double found = error_of(variant.vector_products, count, columns);
                if (found < 1e-5) continue;
                ++failures;
                std::fprintf(stderr, "failed: %s: %d rows of %d columns: off by %g\n",
                             std::string(variant.name).c_str(), static_cast<int>(count), static_cast<int>(columns),
                             found);
            }
        }
    }
    return failures;
}
