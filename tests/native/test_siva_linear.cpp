// The products of csrc/cpu/siva_linear_products.h by every instruction set against plain sums in double, on buffers
// that end where the numbers do: a read or write past an end is the sanitizer's to find.
#include <cmath>
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

double error_of(const LowRank& run, int64_t rows, int64_t ranks, int64_t columns) {
    std::vector<float> x = numbers(rows * columns, 1), c = numbers(rows * ranks, 2), start = numbers(columns, 3);
    std::vector<float> factors = numbers(ranks * columns, 4), projected(rows * ranks), out(rows * columns);
    std::vector<float> sums = numbers(ranks * columns, 5);
    const std::vector<float> before = sums;
    const Rows of_x = {x.data(), rows, columns}, of_c = {c.data(), rows, ranks};
    const Factors shape = {factors.data(), ranks, columns};
    run.project(of_x, shape, {projected.data(), rows, ranks});
    run.expand(of_c, shape, start.data(), {out.data(), rows, columns});
    run.reduce(of_c, of_x, ranks, columns, sums.data());
    const double project = error(projected, rows, ranks, [&](int64_t m, int64_t r) {
        double sum = 0.0;
        for (int64_t k = 0; k < columns; ++k) sum += double{x[m * columns + k]} * factors[r * columns + k];
        return sum;
    });
    const double expand = error(out, rows, columns, [&](int64_t m, int64_t n) {
        double sum = start[n];
        for (int64_t r = 0; r < ranks; ++r) sum += double{c[m * ranks + r]} * factors[r * columns + n];
        return sum;
    });
    const double reduce = error(sums, ranks, columns, [&](int64_t r, int64_t k) {
        double sum = before[r * columns + k];
        for (int64_t m = 0; m < rows; ++m) sum += double{c[m * ranks + r]} * x[m * columns + k];
        return sum;
    });
    return std::fmax(project, std::fmax(expand, reduce));
}

}  // namespace

int low_rank_failures() {
    int failures = 0;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        for (int64_t rows : {0, 1, 3, 5, 64}) {
            for (int64_t ranks : {0, 4, 8, 64}) {
                for (int64_t columns : {0, 1, 15, 17, 63, 65, 130}) {
                    const double found = error_of(variant.low_rank, rows, ranks, columns);
                    if (found < 1e-4) continue;
                    ++failures;
                    std::fprintf(stderr, "failed: %s: %d rows, %d ranks, %d columns: off by %g\n",
                                 std::string(variant.name).c_str(), static_cast<int>(rows), static_cast<int>(ranks),
                                 static_cast<int>(columns), found);
                }
            }
        }
    }
    return failures;
}
