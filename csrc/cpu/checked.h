// What torch's stable headers lack.
#pragma once

#include <torch/csrc/stable/ops.h>

// torch 2.10's own check says less about an error.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace fastpeft {

// Of a tensor that is read, or that was made here. mutable_data_ptr copies a lazy clone, and raises where threads run.
template <typename T>
T* elements(const torch::stable::Tensor& t) {
    return const_cast<T*>(static_cast<const T*>(t.const_data_ptr()));
}

}  // namespace fastpeft
