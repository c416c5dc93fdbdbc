// The window attention passes of every instruction set on buffers that end where the numbers do: a read or write past
// an end is the sanitizer's to find. Gradients and dropout are compared with the reference in Python's tests.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "cpu/variants.h"

namespace {

using namespace fastpeft;

template <typename T>
std::vector<T> numbers(int64_t size, int seed) {
    std::vector<T> out;
    for (int64_t i = 0; i < size; ++i) out.push_back(store<T>(std::sin(static_cast<float>(seed + 7 * i))));
    return out;
}

struct Free {
    void operator()(char* at) const { ::operator delete(at, std::align_val_t{64}); }
};

// the largest difference of out from loops over the keys as Key stores them, with every second token hidden and an
// absent slot 0
template <typename Key, typename T>
double error_of(const PassesOf<T>& run, Drop* drop, int64_t heads, int64_t tokens, int64_t width, int64_t real) {
    std::vector<int64_t> slots;
    for (int64_t s = 0; s < real; ++s) slots.push_back(s + 1);
    const int64_t absent = 0, rows = heads * tokens, number = real + 1;
    const std::vector<float> p = numbers<float>(number * width, 2);
    std::unique_ptr<bool[]> mask(new bool[tokens]);
    for (int64_t t = 0; t < tokens; ++t) mask[t] = t % 2 == 0;
    Window window = {heads,    tokens, width,   number, slots.data(), real, &absent,
                     p.data(), false,  nullptr, 5,      16,           0,    1.0};
    std::vector<T> q = numbers<T>(rows * width, 1), c = numbers<T>(real * tokens * width, 3), out(rows * width);
    std::vector<T> dout = numbers<T>(rows * width, 4), dq(rows * width), dc(real * tokens * width);
    std::vector<float> lse(rows), dp(number * width);
    const auto matrix = [&](std::vector<T>& x) { return TokenRows<T>{x.data(), tokens * width, width}; };
    const Sentence<T> sentence = {0, mask.get(), matrix(c)};
    const size_t bytes = std::max(run.forward_scratch(window), run.backward_scratch(window));
    const std::unique_ptr<char, Free> scratch(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
    run.attend(window, sentence, matrix(q), matrix(out), lse.data(), scratch.get());
    run.attend_backward(window, sentence, matrix(dout), matrix(q), matrix(out), lse.data(), matrix(dq), matrix(dc),
                        dp.data(), scratch.get());
    double largest = 0.0;
    const auto compare = [&](double found, double expected) {
        const double error = std::fabs(found - expected);
        largest = std::fmax(largest, std::isnan(error) ? INFINITY : error);
    };
    const auto kept = [](float of_key) { return double{load(store<Key>(of_key))}; };
    for (int64_t r = 0; r < rows; ++r) {
        double total = 0.0;
        std::vector<double> sums(width);
        const auto add = [&](double times, const auto& key) {
            double score = 0.0;
            for (int64_t d = 0; d < width; ++d) score += double{load(q[r * width + d])} * key(d);
            const double weight = times * std::exp(score - lse[r]);
            total += weight;
            for (int64_t d = 0; d < width; ++d) sums[d] += weight * key(d);
        };
        for (int64_t n = 0; n < real * tokens; ++n) {
            const int64_t slot = n / tokens + 1;
            const auto key = [&](int64_t d) { return kept(load(c[n * width + d]) + p[slot * width + d]); };
            if (mask[n % tokens]) add(1.0, key);
        }
        add(static_cast<double>((tokens + 1) / 2), [&](int64_t d) { return kept(p[d]); });
        compare(total, 1.0);
        for (int64_t d = 0; d < width; ++d) compare(load(out[r * width + d]), sums[d]);
    }
    window.drop = drop;
    run.attend(window, sentence, matrix(q), matrix(out), lse.data(), scratch.get());
    run.attend_backward(window, sentence, matrix(dout), matrix(q), matrix(out), lse.data(), {}, {}, dp.data(),
                        scratch.get());
    return largest;
}

// how many of the sizes have an error of `most` and above
template <typename Key, typename T>
int failures_of(std::string_view name, const PassesOf<T>& run, Drop* drop, double most) {
    int failures = 0;
    for (int64_t heads : {1, 3}) {
        for (int64_t tokens : {1, 5, 50}) {
            for (int64_t width : {1, 7, 40, 64}) {
                for (int64_t real : {1, 5}) {
                    const double error = error_of<Key>(run, drop, heads, tokens, width, real);
                    if (error < most) continue;
                    ++failures;
                    std::fprintf(stderr, "failed: %s: window attention of %d x %d tokens, %d wide, %d slots: %g\n",
                                 std::string(name).c_str(), static_cast<int>(heads), static_cast<int>(tokens),
                                 static_cast<int>(width), static_cast<int>(real), error);
                }
            }
        }
    }
    return failures;
}

}  // namespace

int window_failures() {
    int failures = 0;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        failures += failures_of<float>(variant.name, variant.passes.of_float, variant.drop, 1e-4);
        failures += failures_of<float>(variant.name, variant.passes.of_bfloat, variant.drop, 0.02);
    }
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) {
        failures += failures_of<BFloat16>("avx512bf16", avx512bf16::passes, avx512::variant.drop, 0.02);
    }
#endif
    return failures;
}
