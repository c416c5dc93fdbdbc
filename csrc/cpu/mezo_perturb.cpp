// fastpeft::mezo_perturb_ and mezo_perturb on CPU tensors: one thread, one element after the other.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "normal.h"

namespace fastpeft {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Options {
    bool rademacher;
    bool stochastic;
};

Options parse(const std::string& noise, const std::string& rounding) {
    STD_TORCH_CHECK(noise == "gaussian" || noise == "rademacher", "noise is '", noise,
                    "'; allowed are gaussian, rademacher");
    STD_TORCH_CHECK(rounding == "nearest" || rounding == "stochastic", "rounding is '", rounding,
                    "'; allowed are nearest, stochastic");
    return {noise == "rademacher", rounding == "stochastic"};
}

// float16 and bfloat16 are computed in float32
template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
T round_to_storage(compute_t<T> value, bool stochastic, uint32_t word) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (stochastic) value = round_to_bfloat16(value, word);
    } else if constexpr (std::is_same_v<T, Half>) {
        if (stochastic) value = round_to_float16(value, word);
    }
    return static_cast<T>(value);
}

// p <- round(fl(fl(a p) + fl(scale z))) for one term; element e has the flat index offset + e.
template <typename T>
void apply_term(T* p, uint64_t numel, uint64_t offset, uint64_t seed, compute_t<T> scale, compute_t<T> a,
                Options options) {
    constexpr bool kHalf = std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>;
    const bool stochastic = kHalf && options.stochastic;
    const uint64_t end = offset + numel;
    for (uint64_t q = offset / 4; 4 * q < end; ++q) {
        const Lanes lanes = options.rademacher ? rademacher(q, seed) : gaussian(q, seed);
        const Words words = stochastic ? random_words(q, seed, kRounding) : Words{};
        for (uint64_t i = std::max(4 * q, offset); i < std::min(4 * q + 4, end); ++i) {
            T& element = p[i - offset];
            const compute_t<T> kept = static_cast<compute_t<T>>(element) * a;
            const compute_t<T> added = static_cast<compute_t<T>>(lanes.z[i % 4]) * scale;
            element = round_to_storage<T>(kept + added, stochastic, words.w[i % 4]);
        }
    }
}

template <typename T>
void apply_terms(const Tensor& dense, int64_t offset, const std::vector<int64_t>& seeds,
                 const std::vector<double>& scales, double decay, Options options) {
    T* p = static_cast<T*>(dense.mutable_data_ptr());
    double a = 1.0 - decay;
    for (size_t term = 0; term < seeds.size(); ++term) {
        apply_term<T>(p, dense.numel(), offset, seeds[term], static_cast<compute_t<T>>(scales[term]),
                      static_cast<compute_t<T>>(a), options);
        a = 1.0;
    }
}

void perturb(Tensor& param, int64_t offset, const std::vector<int64_t>& seeds, const std::vector<double>& scales,
             double decay, Options options) {
    // flat indices follow the C order of the logical tensor, so other strides go through a copy
    Tensor dense = param.is_contiguous() ? param : torch::stable::contiguous(param);
    switch (param.scalar_type()) {
        case ScalarType::Float:
            apply_terms<float>(dense, offset, seeds, scales, decay, options);
            break;
        case ScalarType::Double:
            apply_terms<double>(dense, offset, seeds, scales, decay, options);
            break;
        case ScalarType::BFloat16:
            apply_terms<BFloat16>(dense, offset, seeds, scales, decay, options);
            break;
        case ScalarType::Half:
            apply_terms<Half>(dense, offset, seeds, scales, decay, options);
            break;
        default:
            STD_TORCH_CHECK(false, "mezo_perturb takes float16, bfloat16, float32 and float64 parameters");
    }
    if (!param.is_contiguous()) torch::stable::copy_(param, dense);
}

void mezo_perturb_(std::vector<Tensor> params, std::vector<int64_t> offsets, std::vector<int64_t> seeds,
                   std::vector<double> scales, double decay, std::string noise, std::string rounding) {
    STD_TORCH_CHECK(params.size() == offsets.size() && seeds.size() == scales.size(),
                    "mezo_perturb_ takes one offset per parameter and one scale per seed");
    const Options options = parse(noise, rounding);
    for (size_t i = 0; i < params.size(); ++i) perturb(params[i], offsets[i], seeds, scales, decay, options);
}

Tensor mezo_perturb(Tensor param, int64_t offset, std::vector<int64_t> seeds, std::vector<double> scales, double decay,
                    std::string noise, std::string rounding) {
    STD_TORCH_CHECK(seeds.size() == scales.size(), "mezo_perturb takes one scale per seed");
    Tensor out = torch::stable::clone(param);
    perturb(out, offset, seeds, scales, decay, parse(noise, rounding));
    return out;
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/_ops.py
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("mezo_perturb_", TORCH_BOX(&mezo_perturb_));
    m.impl("mezo_perturb", TORCH_BOX(&mezo_perturb));
}

}  // namespace fastpeft
