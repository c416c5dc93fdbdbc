// fastpeft::feature_dropout_ on CPU tensors: each sentence's part of each slot is a stretch of that slot's noise.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "arithmetic.h"
#include "feature_dropout_arguments.h"
#include "variants.h"

namespace fastpeft {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 1 << 13;  // elements below which another thread costs more than it saves

// Whether the slots of all sentences, of `row` elements each, lie beside each other and none on another: one that does
// would be dropped twice, perhaps by two threads at a time.
bool are_apart(const Tensor& c, int64_t row) {
    const int inner = c.stride(0) < c.stride(1) ? 0 : 1, outer = 1 - inner;
    const int64_t extent = row + (c.size(inner) - 1) * c.stride(inner);
    return (c.size(inner) == 1 || c.stride(inner) >= row) && (c.size(outer) == 1 || c.stride(outer) >= extent);
}

void feature_dropout_(Tensor c, std::vector<int64_t> slots, double dropout, int64_t seed, int64_t block) {
    const auto type = c.scalar_type();
    const bool is_double = type == torch::headeronly::ScalarType::Double;
    STD_TORCH_CHECK(is_double || type == torch::headeronly::ScalarType::Float,
                    "feature_dropout_ takes float32 and float64");
    STD_TORCH_CHECK(c.dim() == 4 && c.size(1) == static_cast<int64_t>(slots.size()),
                    "feature_dropout_ takes c (B, S, T, D) and S slots");
    if (c.numel() == 0) return;
    const int64_t batch = c.size(0), real = c.size(1), tokens = c.size(2), width = c.size(3), row = tokens * width;
    STD_TORCH_CHECK((width == 1 || c.stride(3) == 1) && (tokens == 1 || c.stride(2) == width),
                    "feature_dropout_ takes a tensor that is dense in its last two dimensions");
    const Dropout dropped = parse_dropout("feature_dropout_", dropout, seed, block, slots);
    STD_TORCH_CHECK(are_apart(c, row), "feature_dropout_ takes a tensor no element of which is reached twice");

    Drop* const drop = choose_variant().drop;
    const Format format = is_double ? Format::kFloat64 : Format::kFloat32;
    char* const data = static_cast<char*>(c.mutable_data_ptr());
    const int64_t itemsize = static_cast<int64_t>(c.element_size()), stride_b = c.stride(0), stride_s = c.stride(1);
    const int64_t grain = std::max<int64_t>(1, kGrain / row);
    torch::stable::parallel_for(0, batch * real, grain, [&](int64_t begin, int64_t end) {
        const DefaultArithmetic arithmetic;
        for (int64_t i = begin; i < end; ++i) {
            const int64_t b = i / real, s = i % real;
            Dropout change = dropped;
            change.ordinal += static_cast<uint32_t>(slots[s]);
            drop(data + (b * stride_b + s * stride_s) * itemsize, format, b * row, row, change);
        }
    });
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("feature_dropout_", TORCH_BOX(&feature_dropout_)); }

}  // namespace fastpeft
