// Products with a frozen weight, dense, packed or quantised, and the operands that the ops of SiVA are given.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "checked.h"
#include "variants.h"

// of torch/csrc/inductor/aoti_torch/c/shim_cpu.h, which a module on the stable ABI cannot include; weak, because a
// torch that is built without oneDNN lacks them, and makes no packs
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle weight,
                                                                      AtenTensorHandle* bias, const char* attr,
                                                                      const double** scalars, int64_t scalars_len_,
                                                                      const char** algorithm, AtenTensorHandle* ret0);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(AtenTensorHandle x, AtenTensorHandle other,
                                                                             AtenTensorHandle weight,
                                                                             AtenTensorHandle* bias, const char* attr,
                                                                             AtenTensorHandle* ret0);
}

namespace fastpeft {
namespace siva {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;
using Flags = std::vector<bool>;

constexpr int64_t kMaxRank = 64;           // of one layer; for more of them BLAS is as good
constexpr int64_t kNf4Block = 64;          // values of nf4 that share a scale
constexpr int64_t kSide = 256;             // rows or columns of a quantised weight that are numbers at one time
constexpr int64_t kGrainValues = 1 << 15;  // values that are worth a thread

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether these kernels take the operands; otherwise ATen does.
inline bool is_supported(const Tensor& x, const Tensors& ss) {
    const ScalarType kind = x.scalar_type();
    return (kind == ScalarType::Float || kind == ScalarType::BFloat16) &&
           std::all_of(ss.begin(), ss.end(),
                       [](const Tensor& s) { return s.scalar_type() == ScalarType::Float && s.numel() <= kMaxRank; });
}

// -- operands -----------------------------------------------------------------------------------------------------

inline void check(bool fits) {
    STD_TORCH_CHECK(fits,
                    "siva_linear takes x, weight and bias in float32 or bfloat16, all alike, and factors in float32, "
                    "whose shapes fit together");
}

inline bool is_matrix(const Tensor& t, int64_t rows, int64_t columns, ScalarType kind = ScalarType::Float) {
    return t.scalar_type() == kind && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

inline bool is_vector(const Tensor& t, int64_t size, ScalarType kind = ScalarType::Float) {
    return t.scalar_type() == kind && t.dim() == 1 && t.size(0) == size;
}

// M of (*, columns).
inline int64_t num_rows(const Tensor& t) {
    check(t.dim() > 0);
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
    return rows;
}

// (*, columns) as (M, columns), each row without gaps: a copy where they have some.
class Matrix {
  public:
    explicit Matrix(const Tensor& t) : tensor_(t), rows_(num_rows(t)) {
        columns_ = stride_ = t.size(t.dim() - 1);
        if (t.is_contiguous()) return;
        if (t.dim() != 2) tensor_ = torch::stable::reshape(t, {rows_, columns_});
        if (tensor_.stride(1) != 1 || tensor_.stride(0) < columns_) tensor_ = torch::stable::contiguous(tensor_);
        stride_ = tensor_.stride(0);
    }

    Tensor tensor() const { return tensor_.dim() == 2 ? tensor_ : torch::stable::view(tensor_, {rows_, columns_}); }
    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    ScalarType kind() const { return tensor_.scalar_type(); }
    template <typename T>
    RowsOf<T> some(const int64_t* numbers, int64_t count) const {
        return {elements<T>(tensor_), stride_, numbers, count};
    }

  private:
    Tensor tensor_;
    int64_t rows_, columns_, stride_;
};

// The shape of x or dh but for its last dimension.
inline Tensor new_rows(const Tensor& like, int64_t columns) {
    std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    sizes.back() = columns;
    return torch::stable::new_empty(like, sizes);
}

// -- products with the weight -------------------------------------------------------------------------------------

// W (N, K): dense, packed, or quantised, which has scales and codes in int8 or, of nf4, in bytes.
struct Weight {
    Tensor values;
    std::optional<Tensor> scales = std::nullopt;

    bool is_nf4() const { return values.scalar_type() == ScalarType::Byte; }
};
using Weights = std::vector<Weight>;

inline bool is_packed(const Tensor& weight) {
    int32_t layout;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
    return layout == aoti_torch_layout__mkldnn();
}

// x W^T + b for a packed W, plus `more` in the place of b
inline Tensor packed_product(const Tensor& x, const Tensor& packed, const Tensor* bias, const Tensor* more) {
    AtenTensorHandle found, of_bias = bias == nullptr ? nullptr : bias->get();
    AtenTensorHandle* const optional_bias = bias == nullptr ? nullptr : &of_bias;
    if (more == nullptr) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), packed.get(), optional_bias, "none",
                                                                       nullptr, 0, nullptr, &found));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu__linear_pointwise_binary(x.get(), more->get(), packed.get(), optional_bias, "add", &found));
    }
    return Tensor(found);
}

// Is a bfloat16 product by ATen slower than one of float32 copies? Without AVX-512, where oneDNN does not serve it, it
// takes 7 times as long forward and up to 75 times backward, but for one or two rows.
inline bool is_widened(const Matrix& rows) {
#if defined(__x86_64__)
    return rows.kind() == ScalarType::BFloat16 && rows.rows() > 2 && choose_variant().name != "avx512";
#else
    return false;
#endif
}

inline Tensor widened(const Tensor& t) { return torch::stable::to(t, ScalarType::Float); }

// The same numbers, which autograd does not know as a view of others: it allows no change in place of an output that is
// one.
inline Tensor no_view(const Tensor& t) {
    using torch::stable::detail::from;
    std::array<StableIValue, 2> stack{from(t), from(t.sizes())};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_unsafe_view", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// x W^T + b (*, N) for a dense or packed W
inline Tensor product(const Tensor& x, const Matrix& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
    std::optional<Tensor> dense = bias;
    if (bias.has_value() && !bias->is_contiguous()) dense = torch::stable::contiguous(*bias);
    if (is_packed(weight)) {
        const Tensor h = packed_product(x, weight, dense.has_value() ? &*dense : nullptr, nullptr);
        return h.dim() == 2 ? h : no_view(h);  // oneDNN makes it as a matrix
    }
    Tensor h = new_rows(x, weight.size(0));
    if (is_widened(rows)) {
        if (dense.has_value()) dense = widened(*dense);
        const Tensor wide = widened(x);
        torch::stable::copy_(h, product(wide, Matrix(wide), widened(weight), dense));
        return h;
    }
    const Tensor target = Matrix(h).tensor(), factor = torch::stable::transpose(weight, 0, 1);
    if (dense.has_value()) {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu_addmm_out(target.get(), dense->get(), rows.tensor().get(), factor.get(), 1.0, 1.0));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), rows.tensor().get(), factor.get()));
    }
    return h;
}

// The sum of all dh W (*, K) for dense or packed W; what is packed is W^T.
inline Tensor sum_of_products(const Tensors& dhs, const std::vector<Matrix>& rows, const Tensors& weights, int64_t k) {
    if (is_widened(rows[0]) && !is_packed(weights[0])) {
        Tensors wide_dhs, wide_weights;
        std::vector<Matrix> wide_rows;
        for (size_t i = 0; i < weights.size(); ++i) {
            wide_dhs.push_back(widened(dhs[i]));
            wide_rows.emplace_back(wide_dhs[i]);
            wide_weights.push_back(widened(weights[i]));
        }
        Tensor dx = new_rows(dhs[0], k);
        torch::stable::copy_(dx, sum_of_products(wide_dhs, wide_rows, wide_weights, k));
        return dx;
    }
    std::optional<Tensor> sum;
    for (size_t i = 0; i < weights.size(); ++i) {
        if (is_packed(weights[i])) {
            sum = packed_product(dhs[i], weights[i], nullptr, sum.has_value() ? &*sum : nullptr);
            continue;
        }
        const bool first = !sum.has_value();
        if (first) sum = new_rows(dhs[0], k);
        const Tensor target = Matrix(*sum).tensor(), dh = rows[i].tensor();
        AtenTensorHandle to = target.get();
        STABLE_TORCH_ERROR_CODE_CHECK(first ? aoti_torch_cpu_mm_out(to, dh.get(), weights[i].get())
                                            : aoti_torch_cpu_addmm_out(to, to, dh.get(), weights[i].get(), 1.0, 1.0));
    }
    return *sum;
}

inline Weight quantised(const Tensor& codes, const Tensor& scales) {
    return {torch::stable::contiguous(codes), torch::stable::contiguous(scales)};
}

// The weights of a group, of which those with scales are quantised.
inline Weights frozen(const Tensors& weights, const Optionals& scales) {
    check(weights.size() == scales.size());
    Weights found;
    for (size_t i = 0; i < weights.size(); ++i) {
        found.push_back(scales[i].has_value() ? quantised(weights[i], *scales[i]) : Weight{weights[i]});
    }
    return found;
}

// Is this a quantised weight (N, K)?
inline bool is_quantised(const Weight& weight, int64_t n, int64_t k) {
    const auto& [codes, scales] = weight;
    const bool is_nf4 = weight.is_nf4();
    const int64_t size = n * k;
    return (is_nf4 || codes.scalar_type() == ScalarType::Char) &&
           codes.numel() >= (is_nf4 ? ceil_div(size, 2) : size) && scales->scalar_type() == ScalarType::Float &&
           scales->numel() >= (is_nf4 ? ceil_div(size, kNf4Block) : n);
}

// to = the part of W (N, K) that begins at this row and column
inline void dequantise(const Weight& weight, int64_t k, int64_t row, int64_t column, const Tensor& to) {
    const Dequantisers& loops = choose_variant().dequantisers;
    const int64_t columns = to.size(1), block = weight.is_nf4() ? kNf4Block : std::max<int64_t>(1, k);
    const void* codes = weight.values.const_data_ptr();
    const float* scales = static_cast<const float*>(weight.scales->const_data_ptr());
    const auto run = [&](auto* loop, auto* numbers) {
        torch::stable::parallel_for(0, to.size(0), ceil_div(kGrainValues, columns), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                loop(codes, scales, block, (row + i) * k + column, columns, numbers + i * columns);
            }
        });
    };
    if (to.scalar_type() == ScalarType::Float) {
        run(weight.is_nf4() ? loops.nf4_float : loops.int8_float, static_cast<float*>(to.mutable_data_ptr()));
    } else {
        run(weight.is_nf4() ? loops.nf4_bfloat : loops.int8_bfloat, static_cast<BFloat16*>(to.mutable_data_ptr()));
    }
}

// rows W^T + b (*, N) for a quantised W (N, K), or rows W (*, K): kSide of the columns at a time, so that what is there
// of W as numbers stays in cache. The rows are those of x. It is added to `sum`, if that is there.
inline Tensor quantised_product(const Tensor& x, const Matrix& rows, const Weight& weight, int64_t n, int64_t k,
                                bool transposed, const std::optional<Tensor>& bias,
                                const std::optional<Tensor>& sum = std::nullopt) {
    const int64_t columns = transposed ? n : k;
    Tensor out = sum.has_value() ? *sum : new_rows(x, columns);
    if (is_widened(rows)) {
        const Tensor wide = widened(x);
        const std::optional<Tensor> wide_bias = bias.has_value() ? std::optional(widened(*bias)) : std::nullopt;
        const std::optional<Tensor> wide_sum = sum.has_value() ? std::optional(widened(*sum)) : std::nullopt;
        torch::stable::copy_(out, quantised_product(wide, Matrix(wide), weight, n, k, transposed, wide_bias, wide_sum));
        return out;
    }
    Tensor target = Matrix(out).tensor();
    for (int64_t first = 0; rows.rows() > 0 && first < columns; first += kSide) {
        const int64_t count = std::min(kSide, columns - first);
        const std::vector<int64_t> sizes = transposed ? std::vector{count, k} : std::vector{n, count};
        Tensor numbers = torch::stable::new_empty(x, sizes);
        if (numbers.numel() > 0) dequantise(weight, k, transposed ? first : 0, transposed ? 0 : first, numbers);
        if (transposed) numbers = torch::stable::transpose(numbers, 0, 1);
        const Tensor part = torch::stable::narrow(target, 1, first, count);
        if (bias.has_value() || sum.has_value()) {
            Tensor all = bias.has_value() ? *bias : target;
            const Tensor own = torch::stable::narrow(all, bias.has_value() ? 0 : 1, first, count);
            STABLE_TORCH_ERROR_CODE_CHECK(
                aoti_torch_cpu_addmm_out(part.get(), own.get(), rows.tensor().get(), numbers.get(), 1.0, 1.0));
        } else {
            STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(part.get(), rows.tensor().get(), numbers.get()));
        }
    }
    return out;
}

}  // namespace siva
}  // namespace fastpeft
