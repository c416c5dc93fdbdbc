// What an op leaves to ATen's calls.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "checked.h"

namespace fastpeft {

template <typename T>
StableIValue box(const T& value) {
    return torch::stable::detail::from(value);
}

inline StableIValue box(const std::vector<bool>& flags) {  // whose elements have no address
    const std::unique_ptr<bool[]> copy(new bool[flags.size()]);
    std::copy(flags.begin(), flags.end(), copy.get());
    return torch::stable::detail::from(torch::headeronly::HeaderOnlyArrayRef<bool>(copy.get(), flags.size()));
}

// The results of the same op by ATen's calls (its file in fastpeft/ops, put there by fastpeft/ops/backends.py) as one
// list: torch takes the types of several results in the wrong order.
template <typename... Arguments>
std::vector<torch::stable::Tensor> by_aten(const char* op, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(Arguments)> stack{box(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<std::vector<torch::stable::Tensor>>(stack[0]);
}

}  // namespace fastpeft
