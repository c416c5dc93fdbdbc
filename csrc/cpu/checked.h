// STABLE_TORCH_ERROR_CODE_CHECK, which torch 2.10 lacks: its own check says less about an error.
#pragma once

#include <torch/csrc/stable/ops.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
