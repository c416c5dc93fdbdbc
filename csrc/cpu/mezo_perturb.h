// What mezo_perturb and feature_dropout_ do to a stretch of memory, and the instruction sets they are compiled for.
#pragma once

#include <cstddef>
#include <cstdint>

#include "philox.h"
#include "storage.h"

namespace fastpeft {

struct Term {
    uint64_t seed;
    double scale;
    double keep;  // what is left of the parameter: 1 - decay for the first term, 1 for the others
};

struct Change {
    const Term* terms;
    size_t num_terms;
    bool rademacher;
    bool stochastic;
};

constexpr uint64_t kTile = 4096;  // elements that go through all terms before the next are touched: they fit in cache

// p[i] <- round(fl(fl(keep p[i]) + fl(scale z(seed, first + i)))) for i < count, term after term
using Perturb = void(void* p, Format format, uint64_t first, uint64_t count, const Change& change);

constexpr Stream kDropout{2};  // on a card, Triton draws it

struct Dropout {
    uint64_t seed;
    uint32_t ordinal;    // counter word 3: 16 * block + slot
    uint32_t threshold;  // words from here on keep their element
    double scale;        // of what is kept
};

// x[i] <- x[i] * (word(first + i) >= threshold ? scale : 0) for i < count; float32 and float64
using Drop = void(void* x, Format format, uint64_t first, uint64_t count, const Dropout& dropout);

namespace baseline {
Perturb perturb;
Drop drop;
}  // namespace baseline
#if defined(__x86_64__)
namespace avx2 {
Perturb perturb;
Drop drop;
}  // namespace avx2
namespace avx512 {
Perturb perturb;
Drop drop;
}  // namespace avx512
#endif

}  // namespace fastpeft
