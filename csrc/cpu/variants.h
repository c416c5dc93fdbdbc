// What is compiled once for each instruction set, and which of them this processor runs.
#pragma once

#include <string_view>
#include <vector>

#include "int8_linear_rows.h"
#include "mezo_perturb.h"
#include "siva_linear_products.h"
#include "window_attention.h"

namespace fastpeft {

struct Variant {
    std::string_view name;
    Perturb* perturb;
    Drop* drop;
    LowRank low_rank;
    Int8 int8;
    Passes passes;
    bool supported;
};

// Fastest first.
inline std::vector<Variant> variants() {
    std::vector<Variant> found;
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    found.push_back({"avx512", avx512::perturb, avx512::drop, avx512::low_rank, avx512::int8, avx512::passes, avx512});
    found.push_back({"avx2", avx2::perturb, avx2::drop, avx2::low_rank, avx2::int8, avx2::passes, avx2});
#endif
    found.push_back(
        {"baseline", baseline::perturb, baseline::drop, baseline::low_rank, baseline::int8, baseline::passes, true});
    return found;
}

}  // namespace fastpeft
