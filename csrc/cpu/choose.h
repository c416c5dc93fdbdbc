// Which instruction set runs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "variants.h"

namespace fastpeft {

// The fastest that this processor runs, or the one that FASTPEFT_SIMD names. It is read at every call, so that tests
// and benches compare variants in one process.
inline const Variant& choose_variant() {
    static const std::vector<Variant> all = variants();
    const char* wanted = std::getenv("FASTPEFT_SIMD");
    std::string allowed;
    for (const Variant& variant : all) {
        if (!variant.supported) continue;
        if (wanted == nullptr || wanted == variant.name) return variant;
        allowed.append(allowed.empty() ? "" : ", ").append(variant.name);
    }
    STD_TORCH_CHECK(false, "FASTPEFT_SIMD is '", wanted, "'; allowed on this processor are ", allowed,
                    ". Correct or unset it.");
}

// Are there instructions for bfloat16 beside those of the variant that runs?
inline bool has_bfloat16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") && choose_variant().name == "avx512";
#else
    return false;
#endif
}

}  // namespace fastpeft
