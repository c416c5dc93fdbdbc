// fastpeft::window_attention and its backward on CPU tensors in float32 and bfloat16, which is multiplied as it is
// where the processor can (AVX512-BF16), else widened. Other dtypes and layouts are ATen's calls, in the operation's
// own file.
//
// A sentence is one thread's: it makes its keys and reads them from cache; neither they nor the scores are ever in a
// tensor. A sentence's sums do not depend on the threads, and those of p are added up in the order of the sentences.
#include "window_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arithmetic.h"
#include "by_aten.h"
#include "feature_dropout_arguments.h"
#include "variants.h"

namespace fastpeft {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Of T, with no gaps in the last dimension
template <typename T>
bool are_rows(const Tensor& x) {
    constexpr ScalarType type = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::BFloat16;
    return x.scalar_type() == type && x.dim() == 4 && x.numel() > 0 && (x.size(3) == 1 || x.stride(3) == 1);
}

// Dense, of a type, with a number for each of q's rows, or for each of a head's
bool are_numbers(const Tensor& x, ScalarType type, int64_t count) {
    return x.scalar_type() == type && x.is_contiguous() && x.numel() == count;
}

template <typename T>
bool is_for(const Tensor& q, const Tensor& c, const Tensor& p, const std::optional<Tensor>& mask) {
    return are_rows<T>(q) && are_rows<T>(c) && p.scalar_type() == q.scalar_type() && p.is_contiguous() &&
           (!mask || are_numbers(*mask, ScalarType::Bool, q.size(0) * q.size(2)));
}

template <typename T>
bool is_for_backward(const Tensor& dout, const Tensor& q, const Tensor& c, const Tensor& p,
                     const std::optional<Tensor>& mask, const Tensor& out, const Tensor& lse) {
    if (!is_for<T>(q, c, p, mask)) return false;
    for (const Tensor& x : {dout, out}) {
        if (!are_rows<T>(x) || !x.sizes().equals(q.sizes())) return false;
    }
    return are_numbers(lse, ScalarType::Float, q.size(0) * q.size(1) * q.size(2));
}

template <typename T>
TokenRows<T> token_rows(const Tensor& x, int64_t sentence) {
    return {elements<T>(x) + sentence * x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
const PassesOf<T>& passes() {
    if constexpr (std::is_same_v<T, float>) {
        return choose_variant().passes.of_float;
    } else {
#if defined(__x86_64__)
        if (has_bfloat16()) return avx512bf16::passes;
#endif
        return choose_variant().passes.of_bfloat;
    }
}

// The operands that all sentences share.
template <typename T>
class Shared {
  public:
    Shared(const Tensor& q, const Tensor& c, const Tensor& p, std::optional<Tensor> mask, std::vector<int64_t> slots,
           bool causal, double dropout, const std::optional<Tensor>& seed, int64_t block)
        : c_(c), mask_(std::move(mask)), slots_(std::move(slots)) {
        for (int64_t slot = 0; slot < p.size(0); ++slot) {
            if (std::find(slots_.begin(), slots_.end(), slot) == slots_.end()) absent_.push_back(slot);
        }
        STD_TORCH_CHECK(slots_.size() + absent_.size() == static_cast<size_t>(p.size(0)) && p.size(1) == q.size(3) &&
                            c.size(0) == q.size(0) && c.size(1) == static_cast<int64_t>(slots_.size()) &&
                            c.size(2) == q.size(2) && c.size(3) == q.size(3),
                        "window_attention takes q (B, H, T, D), c (B, S, T, D), p (k, D) and S of k slots");
        window.heads = q.size(1);
        window.tokens = q.size(2);
        window.width = q.size(3);
        window.number = p.size(0);
        window.slots = slots_.data();
        window.real = slots_.size();
        window.absent = absent_.data();
        const T* const numbers = static_cast<const T*>(p.const_data_ptr());
        for (int64_t i = 0; i < p.numel(); ++i) p_.push_back(load(numbers[i]));
        window.p = p_.data();
        window.causal = causal;
        window.drop = dropout > 0 ? choose_variant().drop : nullptr;
        STD_TORCH_CHECK(dropout == 0 || (seed && seed->scalar_type() == ScalarType::Long && seed->numel() == 1),
                        "window_attention takes a seed, one int64, where it drops elements");
        const int64_t number = seed ? *static_cast<const int64_t*>(seed->const_data_ptr()) : 0;
        window.dropout = parse_dropout("window_attention", dropout, number, block, slots_);
    }

    Sentence<T> sentence(int64_t index) const {
        const bool* mask = mask_ ? static_cast<const bool*>(mask_->const_data_ptr()) + index * window.tokens : nullptr;
        return {index, mask, token_rows<T>(c_, index)};
    }

    Window window;

  private:
    Tensor c_;
    std::optional<Tensor> mask_;
    std::vector<int64_t> slots_, absent_;
    std::vector<float> p_;
};

// A pass over all sentences; a thread keeps its scratch for the next.
template <typename Pass>
void each_sentence(int64_t batch, size_t bytes, Pass pass) {
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
        static thread_local std::vector<char> memory;
        if (memory.size() < bytes + 64) memory.resize(bytes + 64);
        char* scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
        const DefaultArithmetic arithmetic;
        for (int64_t b = begin; b < end; ++b) pass(b, scratch);
    });
}

template <typename T>
void attend(const Shared<T>& shared, const Tensor& q, const Tensor& out, const Tensor& lse) {
    const PassesOf<T>& run = passes<T>();
    const int64_t rows = q.size(1) * q.size(2);
    float* const of_lse = static_cast<float*>(lse.mutable_data_ptr());
    each_sentence(q.size(0), run.forward_scratch(shared.window), [&](int64_t b, char* scratch) {
        run.attend(shared.window, shared.sentence(b), token_rows<T>(q, b), token_rows<T>(out, b), of_lse + b * rows,
                   scratch);
    });
}

std::tuple<Tensor, Tensor> window_attention(Tensor q, Tensor c, Tensor p, std::optional<Tensor> mask,
                                            std::vector<int64_t> slots, bool causal, double dropout,
                                            std::optional<Tensor> seed, int64_t block) {
    const bool is_float = is_for<float>(q, c, p, mask);
    if (!is_float && !is_for<BFloat16>(q, c, p, mask)) {
        const Tensors found =
            by_aten("fastpeft::window_attention_aten", q, c, p, mask, slots, causal, dropout, seed, block);
        return {found[0], found[1]};
    }
    const Tensor out = torch::stable::new_empty(q, q.sizes());
    const Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
    if (is_float) {
        attend<float>({q, c, p, mask, slots, causal, dropout, seed, block}, q, out, lse);
    } else {
        attend<BFloat16>({q, c, p, mask, slots, causal, dropout, seed, block}, q, out, lse);
    }
    return {out, lse};
}

template <typename T>
void attend_backward(const Shared<T>& shared, const Tensor& dout, const Tensor& q, const Tensor& out, const Tensor& lse,
                     const Tensor& dq, const Tensor& dc, const Tensor& dp) {
    const PassesOf<T>& run = passes<T>();
    const int64_t batch = q.size(0), rows = q.size(1) * q.size(2), numbers = shared.window.number * q.size(3);
    std::vector<float> parts(batch * numbers);  // of dp, a sentence's after another's
    const float* const of_lse = static_cast<const float*>(lse.const_data_ptr());
    const auto given = [](const Tensor& x, int64_t b) { return x.numel() > 0 ? token_rows<T>(x, b) : TokenRows<T>{}; };
    each_sentence(batch, run.backward_scratch(shared.window), [&](int64_t b, char* scratch) {
        run.attend_backward(shared.window, shared.sentence(b), token_rows<T>(dout, b), token_rows<T>(q, b),
                            token_rows<T>(out, b), of_lse + b * rows, given(dq, b), given(dc, b),
                            parts.data() + b * numbers, scratch);
    });
    if (dp.numel() == 0) return;
    for (int64_t b = 1; b < batch; ++b) {
        for (int64_t i = 0; i < numbers; ++i) parts[i] += parts[b * numbers + i];
    }
    T* const sums = static_cast<T*>(dp.mutable_data_ptr());
    for (int64_t i = 0; i < numbers; ++i) sums[i] = store<T>(parts[i]);
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(Tensor dout, Tensor q, Tensor c, Tensor p,
                                                             std::optional<Tensor> mask, Tensor out, Tensor lse,
                                                             std::vector<int64_t> slots, bool causal, double dropout,
                                                             std::optional<Tensor> seed, int64_t block, bool need_dq,
                                                             bool need_dc, bool need_dp) {
    // that of a sum is one number in every place
    if (dout.dim() == 4 && dout.stride(3) != 1) dout = torch::stable::contiguous(dout);
    const bool is_float = is_for_backward<float>(dout, q, c, p, mask, out, lse);
    if (!is_float && !is_for_backward<BFloat16>(dout, q, c, p, mask, out, lse)) {
        const Tensors found = by_aten("fastpeft::window_attention_backward_aten", dout, q, c, p, mask, out, lse, slots,
                                      causal, dropout, seed, block, need_dq, need_dc, need_dp);
        return {found[0], found[1], found[2]};
    }
    const auto made = [](const Tensor& like, bool needed) {
        return needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
    };
    const Tensor dq = made(q, need_dq), dc = made(c, need_dc), dp = made(p, need_dp);
    if (is_float) {
        attend_backward<float>({q, c, p, mask, slots, causal, dropout, seed, block}, dout, q, out, lse, dq, dc, dp);
    } else {
        attend_backward<BFloat16>({q, c, p, mask, slots, causal, dropout, seed, block}, dout, q, out, lse, dq, dc, dp);
    }
    return {dq, dc, dp};
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("window_attention", TORCH_BOX(&window_attention));
    m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}

}  // namespace fastpeft
