// The products of LowRank by every instruction set against plain sums in double, on buffers
// that end where the numbers do: a read or write past an end is the sanitizer's to find.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
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

// the largest difference between `found` and what `expected(row, column)` says
template <typename Expected>
double error(const std::vector<float>& found, int64_t rows, int64_t columns, const Expected& expected) {
    double largest = 0.0;
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            largest = std::fmax(largest, std::fabs(found[i * columns + j] - expected(i, j)));
        }
    }
    return largest;
}

template <typename T>
T narrowed(float x);
template <>
float narrowed<float>(float x) {
    return x;
}
template <>
BFloat16 narrowed<BFloat16>(float x) {  // cut off, which is a bfloat16 too
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return {static_cast<uint16_t>(bits >> 16)};
}

float widened(float x) { return x; }
float widened(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <typename T>
std::vector<T> narrow(const std::vector<float>& from) {
    std::vector<T> out;
    for (float x : from) out.push_back(narrowed<T>(x));
    return out;
}

template <typename T>
std::vector<float> widen(const std::vector<T>& from) {
    std::vector<float> out;
    for (T x : from) out.push_back(widened(x));
    return out;
}

// The rows of a matrix in an order of their own: every other one from the last on, then those between.
std::vector<int64_t> in_disorder(int64_t rows) {
    std::vector<int64_t> order;
    for (int64_t last : {rows - 1, rows - 2}) {
        for (int64_t m = last; m >= 0; m -= 2) order.push_back(m);
    }
    return order;
}

// `rounding`: of what is stored as T, as a share of it
template <typename T>
double error_of(const LowRankOf<T>& run, double rounding, int64_t rows, int64_t ranks, int64_t columns) {
    std::vector<T> x = narrow<T>(numbers(rows * columns, 1)), out = narrow<T>(numbers(rows * columns, 3));
    std::vector<float> c = numbers(rows * ranks, 2), factors = numbers(ranks * columns, 4), projected(rows * ranks);
    std::vector<float> sums = numbers(ranks * columns, 5);
    const std::vector<float> before = sums, start = widen(out), wide = widen(x);
    const std::vector<int64_t> order = in_disorder(rows);
    const RowsOf<T> of_x = {x.data(), columns, order.data(), rows};
    const Rows of_c = {c.data(), ranks};
    const Factors shape = {factors.data(), ranks, columns};
    run.project(of_x, shape, {projected.data(), ranks});
    run.expand(of_c, shape, {out.data(), columns, order.data(), rows});
    run.reduce(of_c, of_x, ranks, columns, sums.data());
    const double project = error(projected, rows, ranks, [&](int64_t m, int64_t r) {
        double sum = 0.0;
        for (int64_t k = 0; k < columns; ++k) sum += double{wide[order[m] * columns + k]} * factors[r * columns + k];
        return sum;
    });
    double largest = 0.0;
    const std::vector<float> wide_out = widen(out);
    std::vector<float> expanded;
    for (int64_t m : order) {
        expanded.insert(expanded.end(), wide_out.begin() + m * columns, wide_out.begin() + (m + 1) * columns);
    }
    const double expand = error(expanded, rows, columns, [&](int64_t m, int64_t n) {
        double sum = start[order[m] * columns + n];
        for (int64_t r = 0; r < ranks; ++r) sum += double{c[m * ranks + r]} * factors[r * columns + n];
        largest = std::fmax(largest, std::fabs(sum));
        return sum;
    });
    const double reduce = error(sums, ranks, columns, [&](int64_t r, int64_t k) {
        double sum = before[r * columns + k];
        for (int64_t m = 0; m < rows; ++m) sum += double{c[m * ranks + r]} * wide[order[m] * columns + k];
        return sum;
    });
    return std::fmax(project, std::fmax(expand - rounding * largest, reduce));
}

// How many bfloat16 of all are not what adding 0 to them should leave: themselves, and NaN of NaN; of a subnormal one,
// where these count as 0, that.
int changed_bits(const LowRankOf<BFloat16>& run, bool has_subnormal) {
    std::vector<BFloat16> all;
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) all.push_back({static_cast<uint16_t>(bits)});
    const int64_t size = static_cast<int64_t>(all.size());
    std::vector<float> nothing(4, 0.0f), factors(4 * all.size(), 1.0f);
    const int64_t first = 0;
    run.expand({nothing.data(), 4}, {factors.data(), 4, size}, {all.data(), size, &first, 1});
    int wrong = 0;
    for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
        const float itself = widened(BFloat16{static_cast<uint16_t>(bits)}), found = widened(all[bits]);
        const float expected = !has_subnormal && std::fpclassify(itself) == FP_SUBNORMAL ? 0.0f : itself;
        wrong += std::isnan(expected) ? !std::isnan(found) : !(found == expected);  // -0 + 0 is 0
    }
    return wrong;
}

// 1 + 1 / 256 lies between two bfloat16 and must become the even one, a little more the upper.
bool rounds_to_even(const LowRankOf<BFloat16>& run) {
    const std::vector<float> added = {1 / 256.0f, 3 / 256.0f, 1.001f / 256, 0.999f / 256};
    const std::vector<uint16_t> expected = {0x3f80, 0x3f82, 0x3f81, 0x3f80};
    for (size_t i = 0; i < added.size(); ++i) {
        std::vector<float> coefficients = {added[i], 0, 0, 0}, factors(4, 1.0f);
        BFloat16 one = {0x3f80};
        const int64_t first = 0;
        run.expand({coefficients.data(), 4}, {factors.data(), 4, 1}, {&one, 1, &first, 1});
        if (one.bits != expected[i]) return false;
    }
    return true;
}

int rounding_failures(const std::string& name, const LowRankOf<BFloat16>& run, bool has_subnormal) {
    if (changed_bits(run, has_subnormal) == 0 && rounds_to_even(run)) return 0;
    std::fprintf(stderr, "failed: %s: bfloat16 is rounded wrongly\n", name.c_str());
    return 1;
}

template <typename T>
int products_failures(const std::string& name, const LowRankOf<T>& run, double rounding) {
    int failures = 0;
    for (int64_t rows : {0, 1, 3, 5, 64}) {
        for (int64_t ranks : {0, 4, 8, 64}) {
            for (int64_t columns : {0, 1, 15, 17, 63, 65, 130}) {
                const double found = error_of(run, rounding, rows, ranks, columns);
                if (found < 1e-4) continue;
                ++failures;
                std::fprintf(stderr, "failed: %s: %d rows, %d ranks, %d columns: off by %g\n", name.c_str(),
                             static_cast<int>(rows), static_cast<int>(ranks), static_cast<int>(columns), found);
            }
        }
    }
    return failures;
}

}  // namespace

int low_rank_failures() {
    constexpr double kHalfStep = 1.0 / 256;  // of bfloat16
    int failures = 0;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        const std::string name(variant.name);
        failures += rounding_failures(name, variant.low_rank.of_bfloat, true);
        failures += products_failures(name, variant.low_rank.of_float, 0.0);
        failures += products_failures(name, variant.low_rank.of_bfloat, kHalfStep);
    }
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) {
        failures += rounding_failures("avx512bf16", avx512bf16::low_rank, false);
        failures += products_failures("avx512bf16", avx512bf16::low_rank, kHalfStep);
    }
#endif
    return failures;
}
