// What feature_dropout_ does to a stretch of memory, and the instruction sets it is compiled for.
#pragma once

#include <cstdint>

#include "philox.h"
#include "storage.h"

namespace fastpeft {

constexpr Stream kDropout{2};  // on a GPU, Triton draws it

struct Dropout {
    uint64_t seed;
    uint32_t ordinal;    // counter word 3: 16 * block + slot
    uint32_t threshold;  // words from here on keep their element
    double scale;        // of what is kept
};

// x[i] <- x[i] * (word(first + i) >= threshold ? scale : 0) for i < count; float32 and float64
using Drop = void(void* x, Format format, uint64_t first, uint64_t count, const Dropout& dropout);

}  // namespace fastpeft
