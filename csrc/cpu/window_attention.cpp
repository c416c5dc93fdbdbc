// fastpeft::window_attention and its backward on CPU tensors in bfloat16, on a processor that multiplies it
// (AVX512-BF16). Everything else is ATen's calls, in the operation's own file.
//
// A sentence is one thread's: it makes its keys, of 4 bytes an element, and reads them from cache; neither they nor the
// scores are ever in a tensor. A sentence's sums do not depend on the threads, and those of p are added up in the order
// of the sentences.
#include "window_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "by_aten.h"
#include "choose.h"
#include "mezo_perturb_pass.h"

namespace fastpeft {

size_t forward_scratch(const Window& window) {
    const int64_t keys = round_up(window.keys(), kKeyBlock), width = round_up(window.width, 16);
    return 4 * (keys * width + keys + window.tokens * window.width + 2 * width + kRowTile * width +
                3 * keys * kRowTile / 2 + kRowTile * width / 2) +
           64 * 32;
}

size_t backward_scratch(const Window& window) {
    const int64_t keys = round_up(window.keys(), kKeyBlock), width = round_up(window.width, 16);
    return 4 * (2 * keys * width + keys + 2 * window.tokens * window.width + 2 * width + 3 * kRowTile * width +
                4 * kKeyBlock * kRowTile) +
           64 * 32;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

bool has_bfloat16() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16") && choose_variant().name == "avx512";
#else
    return false;
#endif
}

bool are_rows(const Tensor& x) {
    return x.scalar_type() == ScalarType::BFloat16 && x.dim() == 4 && x.numel() > 0 &&
           (x.size(3) == 1 || x.stride(3) == 1);
}

bool is_for_here(const Tensor& q, const Tensor& c, const Tensor& p, const std::optional<Tensor>& mask) {
    return has_bfloat16() && are_rows(q) && are_rows(c) && p.scalar_type() == ScalarType::BFloat16 &&
           p.is_contiguous() && (!mask || mask->is_contiguous());
}

Matrix rows_of(const Tensor& x, int64_t sentence) {
    return {static_cast<BFloat16*>(x.mutable_data_ptr()) + sentence * x.stride(0), x.stride(1), x.stride(2)};
}

// The operands that all sentences share.
class Shared {
  public:
    Shared(const Tensor& q, const Tensor& c, const Tensor& p, std::optional<Tensor> mask, std::vector<int64_t> slots,
           bool causal, double dropout, int64_t seed, int64_t block)
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
        const BFloat16* const halves = static_cast<const BFloat16*>(p.const_data_ptr());
        for (int64_t i = 0; i < p.numel(); ++i) p_.push_back(load(halves[i]));
        window.p = p_.data();
        window.causal = causal;
        window.drop = dropout > 0 ? choose_variant().drop : nullptr;
        window.seed = seed;
        window.ordinal = 16 * block;
        const double threshold = std::nearbyint(dropout * 4294967296.0);
        const bool nothing = threshold > 4294967295.0;  // is kept
        window.threshold = nothing ? 0 : static_cast<uint32_t>(threshold);
        window.scale = nothing ? 0.0 : 1.0 / (1.0 - dropout);
    }

    Sentence sentence(int64_t index) const {
        const bool* mask = mask_ ? static_cast<const bool*>(mask_->const_data_ptr()) + index * window.tokens : nullptr;
        return {index, mask, rows_of(c_, index)};
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

std::tuple<Tensor, Tensor> window_attention(Tensor q, Tensor c, Tensor p, std::optional<Tensor> mask,
                                            std::vector<int64_t> slots, bool causal, double dropout, int64_t seed,
                                            int64_t block) {
    if (!is_for_here(q, c, p, mask)) {
        const Tensors found =
            by_aten("fastpeft::window_attention_aten", q, c, p, mask, slots, causal, dropout, seed, block);
        return {found[0], found[1]};
    }
    const Shared shared(q, c, p, mask, slots, causal, dropout, seed, block);
    const Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
    const Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
#if defined(__x86_64__)
    const int64_t rows = q.size(1) * q.size(2);
    float* const of_lse = static_cast<float*>(lse.mutable_data_ptr());
    each_sentence(q.size(0), forward_scratch(shared.window), [&](int64_t b, char* scratch) {
        avx512bf16::attend(shared.window, shared.sentence(b), rows_of(q, b), rows_of(out, b), of_lse + b * rows,
                           scratch);
    });
#endif
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(Tensor dout, Tensor q, Tensor c, Tensor p,
                                                             std::optional<Tensor> mask, Tensor out, Tensor lse,
                                                             std::vector<int64_t> slots, bool causal, double dropout,
                                                             int64_t seed, int64_t block, bool need_dq, bool need_dc,
                                                             bool need_dp) {
    // that of a sum is one number in every place
    if (dout.dim() == 4 && dout.stride(3) != 1) dout = torch::stable::contiguous(dout);
    if (!is_for_here(q, c, p, mask) || !are_rows(dout) || !are_rows(out) || !lse.is_contiguous()) {
        const Tensors found = by_aten("fastpeft::window_attention_backward_aten", dout, q, c, p, mask, out, lse, slots,
                                      causal, dropout, seed, block, need_dq, need_dc, need_dp);
        return {found[0], found[1], found[2]};
    }
    const Shared shared(q, c, p, mask, slots, causal, dropout, seed, block);
    const int64_t batch = q.size(0), rows = q.size(1) * q.size(2), numbers = p.numel();
    const auto made = [](const Tensor& like, bool needed) {
        if (!needed) return torch::stable::new_empty(like, {0});
        std::vector<int64_t> sizes;
        for (int64_t i = 0; i < like.dim(); ++i) sizes.push_back(like.size(i));
        return torch::stable::new_empty(like, sizes);
    };
    const Tensor dq = made(q, need_dq), dc = made(c, need_dc), dp = made(p, need_dp);
    std::vector<float> parts(batch * numbers);  // of dp, a sentence's after another's
#if defined(__x86_64__)
    const float* const of_lse = static_cast<const float*>(lse.const_data_ptr());
    each_sentence(batch, backward_scratch(shared.window), [&](int64_t b, char* scratch) {
        avx512bf16::attend_backward(shared.window, shared.sentence(b), rows_of(dout, b), rows_of(q, b), rows_of(out, b),
                                    of_lse + b * rows, need_dq ? rows_of(dq, b) : Matrix{},
                                    need_dc ? rows_of(dc, b) : Matrix{}, parts.data() + b * numbers, scratch);
    });
#endif
    if (need_dp) {
        for (int64_t b = 1; b < batch; ++b) {
            for (int64_t i = 0; i < numbers; ++i) parts[i] += parts[b * numbers + i];
        }
        BFloat16* const sums = static_cast<BFloat16*>(dp.mutable_data_ptr());
        for (int64_t i = 0; i < numbers; ++i) sums[i] = store<BFloat16>(parts[i]);
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
