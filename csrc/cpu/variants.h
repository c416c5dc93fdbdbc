// What is compiled once for each instruction set, and which of them this processor runs.
#pragma once

#include <string_view>
#include <vector>

#include "dequantise.h"
#include "feature_dropout.h"
#include "int8_linear_rows.h"
#include "mezo_perturb.h"
#include "side_step_products.h"
#include "siva_linear_products.h"
#include "window_attention.h"

namespace fastpeft {

struct Variant {
    std::string_view name;
    Perturb* perturb;
    Drop* drop;
    LowRank low_rank;
    Int8 int8;
    Dequantisers dequantisers;
    Passes passes;
    VectorProducts vector_products;
    bool supported;
};

// Fastest first.
inline std::vector<Variant> variants() {
    std::vector<Variant> found;
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#define FASTPEFT_VARIANT(isa, supported)                                                                      \
    found.push_back({#isa, isa::perturb, isa::drop, isa::low_rank, isa::int8, isa::dequantisers, isa::passes, \
                     isa::vector_products, supported})
    FASTPEFT_VARIANT(avx512, avx512);
    FASTPEFT_VARIANT(avx2, avx2);
#endif
    FASTPEFT_VARIANT(baseline, true);
    return found;
}

}  // namespace fastpeft
