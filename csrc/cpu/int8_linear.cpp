// fastpeft::int8_linear on CPU tensors.
//
//     h = scale[m] * scales[n] * (q codes^T - zero[m] * sum of codes[n]) + b    x = scale[m] * (q - zero[m])
//
// The product of integers is oneDNN's, by PyTorch. Around it a block of rows stays in cache: its codes and sums are
// made, multiplied and turned to numbers by one thread. Integers add up to the same whatever the order, so neither
// blocks nor threads change a bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "checked.h"
#include "variants.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256;     // rows of one thread at a time: oneDNN copies the weight for each product
constexpr int64_t kGrainRows = 32;  // rows that are worth a thread

// out (M, N) = a (M, K) b (K, N), of integers
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_int_mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);
}

struct Operands {
    Tensor x, codes, scales, sums, out;
    std::optional<Tensor> bias;
};

template <typename T>
void run(const Operands& given, QuantiseRows<T>* quantise, ScaleRows<T>* scale) {
    const int64_t rows = given.x.size(0), k = given.x.size(1), n = given.codes.size(0), stride = given.x.stride(0);
    const Tensor transposed = torch::stable::transpose(given.codes, 0, 1);
    const T* x = static_cast<const T*>(given.x.const_data_ptr());
    T* out = static_cast<T*>(given.out.mutable_data_ptr());
    const float* scales = static_cast<const float*>(given.scales.const_data_ptr());
    const int32_t* of_codes = static_cast<const int32_t*>(given.sums.const_data_ptr());
    const float* bias = given.bias ? static_cast<const float*>(given.bias->const_data_ptr()) : nullptr;
    const auto blocks = [&](int64_t begin, int64_t end, int64_t size) {
        Tensor q = torch::stable::new_empty(given.codes, {size, k});
        Tensor sums = torch::stable::new_empty(given.codes, {size, n}, ScalarType::Int);
        std::vector<Quantised> quantised(size);
        for (int64_t first = begin; first < end; first += size) {
            const int64_t count = std::min(size, end - first);
            quantise(x + first * stride, stride, count, k, static_cast<int8_t*>(q.mutable_data_ptr()),
                     quantised.data());
            multiply(torch::stable::narrow(sums, 0, 0, count), torch::stable::narrow(q, 0, 0, count), transposed);
            scale(static_cast<const int32_t*>(sums.const_data_ptr()), quantised.data(), of_codes, scales, bias, count,
                  n, out + first * n);
        }
    };
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t size = rows < threads * kGrainRows ? rows : std::min(kBlock, (rows + threads - 1) / threads);
    if (size == 0) return;
    const int64_t count = (rows + size - 1) / size;
    if (count == 1) {  // the product itself has threads
        blocks(0, rows, size);
        return;
    }
    torch::stable::parallel_for(
        0, count, 1, [&](int64_t begin, int64_t end) { blocks(begin * size, std::min(end * size, rows), size); });
}

Tensor int8_linear(Tensor x, Tensor codes, Tensor scales, Tensor sums, std::optional<Tensor> bias) {
    const ScalarType type = x.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16,
                    "int8_linear takes x in float32 or bfloat16");
    STD_TORCH_CHECK(x.dim() > 0 && codes.dim() == 2 && codes.scalar_type() == ScalarType::Char &&
                        x.size(x.dim() - 1) == codes.size(1) && scales.scalar_type() == ScalarType::Float &&
                        scales.numel() == codes.size(0) && sums.scalar_type() == ScalarType::Int &&
                        sums.numel() == codes.size(0) && (!bias.has_value() || bias->numel() == codes.size(0)),
                    "int8_linear takes x (*, K), int8 codes (N, K), float32 scales (N), int32 sums (N) and bias (N)");
    int64_t rows = 1;
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
    sizes.back() = codes.size(0);
    Operands given{torch::stable::reshape(x, {rows, codes.size(1)}),
                   torch::stable::contiguous(codes),
                   torch::stable::contiguous(scales),
                   torch::stable::contiguous(sums),
                   torch::stable::new_empty(x, sizes),
                   std::nullopt};
    if (bias.has_value()) given.bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
    if (given.x.size(1) > 1 && given.x.stride(1) != 1) given.x = torch::stable::contiguous(given.x);
    const Int8& loops = choose_variant().int8;
    if (type == ScalarType::Float) {
        run<float>(given, loops.quantise_float, loops.scale_float);
    } else {
        run<uint16_t>(given, loops.quantise_bfloat16, loops.scale_bfloat16);
    }
    return given.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("int8_linear", TORCH_BOX(&int8_linear)); }

}  // namespace fastpeft
