// The loops of csrc/cpu/dequantise.h by every instruction set against the first of them, one number at a time, on
// buffers as large as what they hold.
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/variants.h"

namespace {

using namespace fastpeft;

// Whether runs of numbers, wherever they begin and end, are what the numbers are one by one.
template <typename T>
bool is_right(Dequantise<T>* run, Dequantise<T>* one, bool is_nf4, int64_t block, int64_t size) {
    std::vector<uint8_t> codes;
    for (int64_t i = 0; i < (is_nf4 ? (size + 1) / 2 : size); ++i) codes.push_back(static_cast<uint8_t>(i * 37 + 11));
    std::vector<float> scales;
    for (int64_t i = 0; i < (size + block - 1) / block; ++i) scales.push_back(0.3f * (i + 1));
    std::vector<T> wanted(size);
    for (int64_t i = 0; i < size; ++i) one(codes.data(), scales.data(), block, i, 1, wanted.data() + i);
    for (int64_t begin : {int64_t{0}, int64_t{1}, int64_t{2}, size / 3, size / 2}) {
        for (int64_t end : {begin, size / 2 + 1, size - 1, size}) {
            if (begin > end || end > size) continue;
            std::vector<T> found(end - begin);
            run(codes.data(), scales.data(), block, begin, end - begin, found.data());
            if (end > begin && std::memcmp(found.data(), wanted.data() + begin, found.size() * sizeof(T)) != 0) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace

int dequantise_failures() {
    int failures = 0;
    const Dequantisers& first = baseline::variant.dequantisers;
    for (const Variant& variant : variants()) {
        if (!variant.supported) continue;
        const Dequantisers& loops = variant.dequantisers;
        for (int64_t block : {1, 7, 16, 64, 65}) {
            for (int64_t size : {1, 2, 15, 17, 64, 129, 200}) {
                if (is_right(loops.nf4_float, first.nf4_float, true, block, size) &&
                    is_right(loops.nf4_bfloat, first.nf4_bfloat, true, block, size) &&
                    is_right(loops.int8_float, first.int8_float, false, block, size) &&
                    is_right(loops.int8_bfloat, first.int8_bfloat, false, block, size))
                    continue;
                ++failures;
                std::fprintf(stderr, "failed: %s: dequantise, blocks of %d, %d values\n",
                             std::string(variant.name).c_str(), static_cast<int>(block), static_cast<int>(size));
            }
        }
    }
    return failures;
}
