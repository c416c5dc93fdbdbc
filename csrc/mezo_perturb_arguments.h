// Arguments of mezo_perturb_ and mezo_perturb as the compiled modules take them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

#include "storage.h"

namespace fastpeft {

struct Options {
    bool rademacher;
    bool stochastic;
};

inline Options parse_options(const std::string& noise, const std::string& rounding) {
    STD_TORCH_CHECK(noise == "gaussian" || noise == "rademacher", "noise is '", noise,
                    "'; allowed are gaussian, rademacher");
    STD_TORCH_CHECK(rounding == "nearest" || rounding == "stochastic", "rounding is '", rounding,
                    "'; allowed are nearest, stochastic");
    return {noise == "rademacher", rounding == "stochastic"};
}

inline Format format_of(const torch::stable::Tensor& param) {
    using torch::headeronly::ScalarType;
    switch (param.scalar_type()) {
        case ScalarType::Float:
            return Format::kFloat32;
        case ScalarType::Double:
            return Format::kFloat64;
        case ScalarType::BFloat16:
            return Format::kBFloat16;
        case ScalarType::Half:
            return Format::kFloat16;
        default:
            STD_TORCH_CHECK(false, "mezo_perturb takes float16, bfloat16, float32 and float64 parameters");
    }
}

}  // namespace fastpeft
