// What feature_dropout_ and window_attention are told of dropout, checked once for both.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "feature_dropout.h"

namespace fastpeft {

// Of an op's slot 0; another slot is added to `ordinal`.
inline Dropout parse_dropout(const char* op, double dropout, int64_t seed, int64_t block,
                             const std::vector<int64_t>& slots) {
    // numbers beyond these fit no counter, and their conversions below would have no defined result
    STD_TORCH_CHECK(dropout >= 0 && dropout <= 1 && block >= 0 && block < int64_t{1} << 28, op,
                    " takes a dropout from 0 to 1 and a block from 0 to 2^28 - 1");
    for (const int64_t slot : slots) STD_TORCH_CHECK(slot >= 0 && slot < 16, op, " takes slots from 0 to 15");
    const double threshold = std::nearbyint(dropout * 4294967296.0);  // at most 2^32, where nothing is kept
    const bool nothing = threshold > 4294967295.0;
    return {static_cast<uint64_t>(seed), static_cast<uint32_t>(16 * block),
            nothing ? 0 : static_cast<uint32_t>(threshold), nothing ? 0.0 : 1.0 / (1.0 - dropout)};
}

}  // namespace fastpeft
