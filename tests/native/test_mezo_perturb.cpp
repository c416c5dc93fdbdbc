// The host code of csrc by itself, without torch, so that sanitizers see all of it: `make sanitize`,
// `make sanitize-thread`, and tests/native/test_native.py, which builds it plainly.
//
// Buffers are as large as what they hold: a write past an end is the sanitizer's to find.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cpu/mezo_perturb_pass.h"
#include "cpu/variants.h"
#include "normal.h"
#include "philox.h"
#include "storage.h"

namespace {

using namespace fastpeft;

int failures = 0;

void check(bool condition, const std::string& what) {
    if (condition) return;
    ++failures;
    std::fprintf(stderr, "failed: %s\n", what.c_str());
}

const char* name_of(Format format) {
    switch (format) {
        case Format::kFloat32:
            return "float32";
        case Format::kFloat64:
            return "float64";
        case Format::kBFloat16:
            return "bfloat16";
        default:
            return "float16";
    }
}

constexpr Format kFormats[] = {Format::kFloat32, Format::kFloat64, Format::kBFloat16, Format::kFloat16};

size_t itemsize_of(Format format) { return format == Format::kFloat64 ? 8 : format == Format::kFloat32 ? 4 : 2; }

// What the contract says of one element, from the shared headers alone.
template <typename T>
void expect_as(char* p, uint64_t flat_index, const Change& change) {
    T element;
    std::memcpy(&element, p, sizeof element);
    for (size_t i = 0; i < change.num_terms; ++i) {
        const Term& term = change.terms[i];
        const auto keep = static_cast<compute_t<T>>(term.keep), scale = static_cast<compute_t<T>>(term.scale);
        float z;
        if (change.rademacher) {
            z = sign(random_words(flat_index / 128, term.seed, kNoise).w[flat_index % 128 / 32] >> flat_index % 32);
        } else {
            z = gaussian(random_words(flat_index / 8, term.seed, kNoise)).z[flat_index % 8];
        }
        compute_t<T> value = load(element) * keep + static_cast<compute_t<T>>(z) * scale;
        if (change.stochastic) {
            value = round_stochastic<T>(value, random_words(flat_index / 4, term.seed, kRounding).w[flat_index % 4]);
        }
        element = store<T>(value);
    }
    std::memcpy(p, &element, sizeof element);
}

void expect(char* p, Format format, uint64_t first, uint64_t count, const Change& change) {
    for (uint64_t i = 0; i < count; ++i, p += itemsize_of(format)) {
        switch (format) {
            case Format::kFloat32:
                expect_as<float>(p, first + i, change);
                break;
            case Format::kFloat64:
                expect_as<double>(p, first + i, change);
                break;
            case Format::kBFloat16:
                expect_as<BFloat16>(p, first + i, change);
                break;
            case Format::kFloat16:
                expect_as<Float16>(p, first + i, change);
        }
    }
}

// Numbers of many magnitudes, by the generator under test: their bits only have to differ.
std::vector<char> values(Format format, uint64_t count) {
    std::vector<char> bytes(count * itemsize_of(format));
    for (uint64_t i = 0; i < count; ++i) {
        const Words words = random_words(i, 2026, kNoise);
        const float value = sign(words.w[0]) * std::ldexp(1.0f, static_cast<int>(words.w[1] % 24) - 20) *
                            (1.0f + static_cast<float>(words.w[2] >> 8) * 0x1p-24f);
        const double wide = value;
        const BFloat16 brain = store<BFloat16>(value);
        const Float16 half = store<Float16>(value);
        const void* stored = format == Format::kFloat64    ? static_cast<const void*>(&wide)
                             : format == Format::kBFloat16 ? static_cast<const void*>(&brain)
                             : format == Format::kFloat16  ? static_cast<const void*>(&half)
                                                           : static_cast<const void*>(&value);
        std::memcpy(bytes.data() + i * itemsize_of(format), stored, itemsize_of(format));
    }
    return bytes;
}

std::vector<Variant> supported_variants() {
    std::vector<Variant> found;
    for (const Variant& variant : variants()) {
        if (variant.supported) found.push_back(variant);
    }
    return found;
}

const Term kTerms[] = {{0x123456789ABCDEFull, 1e-3, 0.99}, {7, -2e-3, 1.0}};

std::vector<Change> changes() {
    std::vector<Change> all;
    for (bool rademacher : {false, true}) {
        for (bool stochastic : {false, true}) all.push_back({kTerms, 2, rademacher, stochastic});
    }
    return all;
}

std::string describe(const Variant& variant, Format format, const Change& change) {
    return std::string(variant.name) + " " + name_of(format) + (change.rademacher ? " rademacher" : " gaussian") +
           (change.stochastic ? " stochastic" : " nearest");
}

void test_philox_known_answers() {
    constexpr uint32_t kOnes = 0xFFFFFFFFu;
    const struct {
        Words counter;
        uint32_t key[2];
        Words expected;
        int rounds;
    } answers[] = {
        {{{0, 0, 0, 0}}, {0, 0}, {{0x5f6fb709u, 0x0d893f64u, 0x4f121f81u, 0x4f730a48u}}, 7},
        {{{0, 0, 0, 0}}, {0, 0}, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}, 10},
        {{{kOnes, kOnes, kOnes, kOnes}}, {kOnes, kOnes}, {{0x5207ddc2u, 0x45165e59u, 0x4d8ee751u, 0x8c52f662u}}, 7},
        {{{kOnes, kOnes, kOnes, kOnes}}, {kOnes, kOnes}, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}, 10},
        {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
         {0xa4093822u, 0x299f31d0u},
         {{0x4dfccabau, 0x190a87f0u, 0xc47362bau, 0xb6b5242au}},
         7},
        {{{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
         {0xa4093822u, 0x299f31d0u},
         {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
         10},
    };
    for (const auto& answer : answers) {
        const Words words = philox4x32(answer.counter, answer.key[0], answer.key[1], answer.rounds);
        check(std::memcmp(&words, &answer.expected, sizeof words) == 0, "a known answer of Philox");
    }
    for (Stream stream : {kNoise, kRounding, kDropout}) {
        const Words words = random_words((uint64_t{3} << 32) | 2, (uint64_t{5} << 32) | 4, stream);
        const Words same = philox4x32({{2, 3, stream, 0}}, 4, 5, stream == kNoise ? 7 : 10);
        check(std::memcmp(&words, &same, sizeof words) == 0, "counter and key are split into low and high words");
    }
}

// Against double precision; every half has its frozen bits in tests/ops/test_noise.py.
void test_normal() {
    double worst = 0;
    for (uint64_t q = 0; q < 10'000; ++q) {
        const Words words = random_words(q, 1, kNoise);
        const Lanes lanes = gaussian(words);
        for (uint32_t lane = 0; lane < 8; ++lane) {
            double z = 0;
            for (uint32_t j = 0; j < 8; ++j) {
                const double g = (2.0 * static_cast<int16_t>(words.w[j / 2] >> 16 * (j % 2)) + 1) * 0x1p15;
                const double bend = std::fabs(g) * 0x1.1e301cp-45 - 0x1.83b82ep-15;
                z += g * bend * bend * (__builtin_popcount(j & lane) % 2 ? -1 : 1);
            }
            worst = std::fmax(worst, std::fabs(lanes.z[lane] - z));
        }
    }
    check(worst <= 2e-6, "z is within 2e-6 of double precision, not " + std::to_string(worst));
}

void test_stretches(const Variant& variant) {
    const uint64_t firsts[] = {0, 1, 255, 4095, (1ull << 32) - 50, (1ull << 34) - 3, (1ull << 62) + 5};
    const uint64_t counts[] = {0, 1, 3, 4, 127, 255, 256, 257, 4096, 8200};
    for (Format format : kFormats) {
        const size_t size = itemsize_of(format);
        for (const Change& change : changes()) {
            for (uint64_t first : firsts) {
                for (uint64_t count : counts) {
                    if (count > 300 && first != 0 && first != firsts[4]) continue;  // a few long ones
                    // one element in front moves the start off every alignment but the element's own
                    const std::vector<char> before = values(format, count + 1);
                    std::vector<char> ours = before, theirs = before;
                    variant.perturb(ours.data() + size, format, first, count, change);
                    expect(theirs.data() + size, format, first, count, change);
                    check(ours == theirs, describe(variant, format, change) + ": " + std::to_string(count) +
                                              " elements from " + std::to_string(first));
                }
            }
        }
    }
}

// Infinities, NaN and subnormals among them; the factor rounds in every exponent.
void test_every_half(const Variant& variant, Format format) {
    const Term term = {1, 1e-7, -0.7};
    std::vector<uint16_t> ours(1 << 16), theirs;
    for (size_t i = 0; i < ours.size(); ++i) ours[i] = static_cast<uint16_t>(i);
    theirs = ours;
    for (bool stochastic : {false, true}) {
        const Change change = {&term, 1, false, stochastic};
        variant.perturb(ours.data(), format, 3, ours.size(), change);
        expect(reinterpret_cast<char*>(theirs.data()), format, 3, theirs.size(), change);
        const uint16_t infinity = format == Format::kFloat16 ? 0x7C00u : 0x7F80u;
        bool same = true;
        for (size_t i = 0; i < ours.size(); ++i) {
            const bool nan = (ours[i] & 0x7FFFu) > infinity, expected_nan = (theirs[i] & 0x7FFFu) > infinity;
            same = same && (nan ? expected_nan : ours[i] == theirs[i]);  // which NaN it is, is nobody's promise
        }
        check(same, describe(variant, format, change) + ": every number of the format");
    }
}

// Tensors of several formats and layouts, split among threads where no tile or tensor ends.
void test_threads(const Variant& variant, const Change& change, int num_threads) {
    struct Made {
        std::vector<char> ours, theirs;
    };
    const struct {
        Format format;
        std::vector<int64_t> sizes, strides;
        uint64_t offset;
    } shapes[] = {
        {Format::kFloat32, {1}, {1}, 5},
        {Format::kBFloat16, {9001}, {1}, (1ull << 32) - 4001},
        {Format::kFloat32, {0}, {1}, 0},
        {Format::kFloat64, {70, 90}, {1, 70}, 123},  // transposed
        {Format::kFloat16, {3, 5, 7}, {35, 1, 5}, 1ull << 40},
        {Format::kFloat32, {5000}, {1}, 4096},
    };
    std::vector<Made> made;
    for (const auto& shape : shapes) {
        int64_t numel = 1;
        for (int64_t size : shape.sizes) numel *= size;
        made.push_back({values(shape.format, numel), values(shape.format, numel)});
    }
    std::vector<Task> tasks;
    for (size_t i = 0; i < made.size(); ++i) {
        const auto& shape = shapes[i];
        const size_t size = itemsize_of(shape.format);
        const int64_t numel = made[i].ours.size() / size;
        const Elements elements(made[i].ours.data(), size, shape.sizes, shape.strides);
        tasks.push_back({elements, elements, true, shape.format, shape.offset, numel});
        // element e of the logical tensor lies where its index times the strides says
        for (int64_t e = 0; e < numel; ++e) {
            int64_t rest = e, place = 0;
            for (size_t d = shape.sizes.size(); d-- > 0; rest /= shape.sizes[d]) {
                place += rest % shape.sizes[d] * shape.strides[d];
            }
            expect(made[i].theirs.data() + place * size, shape.format, shape.offset + e, 1, change);
        }
    }
    const Pass pass(tasks, change, variant.perturb);
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads; ++i) {
        const int64_t begin = pass.numel() * i / num_threads, end = pass.numel() * (i + 1) / num_threads;
        threads.emplace_back([&pass, begin, end] { pass.run(begin, end); });
    }
    for (std::thread& thread : threads) thread.join();
    bool same = true;
    for (const Made& tensor : made) same = same && tensor.ours == tensor.theirs;
    check(same, describe(variant, Format::kFloat32, change) + ": " + std::to_string(num_threads) + " threads");
}

// From one tensor to another, whose elements lie elsewhere.
void test_copy(const Variant& variant) {
    const Change change = {kTerms, 2, false, false};
    const int64_t rows = 60, columns = 100;
    std::vector<char> source = values(Format::kFloat32, rows * columns), target(source.size());
    const std::vector<char> before = source;
    const Elements from(source.data(), 4, {rows * columns}, {1}), to(target.data(), 4, {rows, columns}, {1, rows});
    const Pass pass({{from, to, false, Format::kFloat32, 9, rows * columns}}, change, variant.perturb);
    pass.run(0, pass.numel());
    std::vector<char> expected = before;
    expect(expected.data(), Format::kFloat32, 9, rows * columns, change);
    bool same = source == before;
    for (int64_t e = 0; e < rows * columns; ++e) {
        const int64_t place = e % columns * rows + e / columns;
        same = same && std::memcmp(&expected[4 * e], &target[4 * place], 4) == 0;
    }
    check(same, std::string(variant.name) + ": a copy in another layout");
}

// Dropout of stretches that begin and end anywhere, past 2^34 elements too, where a counter's upper half comes in.
template <typename T>
void test_drop(const Variant& variant, Format format) {
    const Dropout dropout = {0x123456789ABCDEFull, 16 * 5 + 3, 0x33333333u, 1.25};
    for (uint64_t first : {uint64_t{0}, uint64_t{1}, uint64_t{255}, (uint64_t{1} << 34) - 300}) {
        for (uint64_t count : {1, 5, 256, 257, 1000}) {
            std::vector<T> x(count, T{3}), expected(count);
            for (uint64_t i = 0; i < count; ++i) {
                const Words words = random_words((first + i) / 4, dropout.seed, kDropout, dropout.ordinal);
                expected[i] = words.w[(first + i) % 4] >= dropout.threshold ? T{3.75} : T{0};
            }
            variant.drop(x.data(), format, first, count, dropout);
            check(x == expected, std::string(variant.name) + " " + name_of(format) + ": dropout of " +
                                     std::to_string(count) + " elements from " + std::to_string(first));
        }
    }
}

}  // namespace

int low_rank_failures();    // test_siva_linear.cpp
int vast_failures();        // test_vast.cpp
int int8_failures();        // test_int8_linear.cpp
int dequantise_failures();  // test_dequantise.cpp
int window_failures();      // test_window_attention.cpp
int side_step_failures();   // test_side_step.cpp

int main() {
    failures += low_rank_failures() + vast_failures() + int8_failures() + dequantise_failures() + window_failures();
    failures += side_step_failures();
    test_philox_known_answers();
    test_normal();
    std::string names;
    for (const Variant& variant : supported_variants()) {
        names.append(" ").append(variant.name);
        test_stretches(variant);
        for (Format format : {Format::kBFloat16, Format::kFloat16}) test_every_half(variant, format);
        for (const Change& change : changes()) {
            for (int num_threads : {1, 2, 3, 8}) test_threads(variant, change, num_threads);
        }
        test_copy(variant);
        test_drop<float>(variant, Format::kFloat32);
        test_drop<double>(variant, Format::kFloat64);
    }
    if (failures > 0) return 1;
    std::printf("passed:%s\n", names.c_str());
    return 0;
}
