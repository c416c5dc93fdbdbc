// What mezo_perturb does to a stretch of memory, and the instruction sets it is compiled for.
#pragma once

#include <cstddef>
#include <cstdint>

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

constexpr uint64_t kNoiseTile = 4096;  // elements that go through all terms before the next are touched, in cache

// p[i] <- round(fl(fl(keep p[i]) + fl(scale z(seed, first + i)))) for i < count, term after term
using Perturb = void(void* p, Format format, uint64_t first, uint64_t count, const Change& change);

}  // namespace fastpeft
