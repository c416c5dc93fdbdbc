// fastpeft::side_step_ on CPU tensors in float32: a side block for one token of each of a few texts, in one call. Its
// matrices have D columns, some hundred at most, so that what other ways of computing it take is mostly their calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "by_aten.h"
#include "choose.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<float>;

constexpr int64_t kMostRows = 8;        // texts; products of more are worth BLAS
constexpr int64_t kMostWork = 1 << 21;  // numbers of all windows; more are worth PyTorch's attention
constexpr double kSqrt2 = 1.4142135623730951, kSqrt2OverPi = 0.7978845608028654;

enum Activation { kRelu, kSilu, kGelu, kGeluTanh };  // in the order of fastpeft/ops/side_step.py

bool is_dense(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_contiguous(); }

// A row of B, each `width` wide and dense in itself.
bool are_rows(const Tensor& t, int64_t batch) {
    return t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == batch &&
           (t.size(1) < 2 || t.stride(1) == 1);
}

// (B, 1, T, width), of which tokens lie beside each other
bool are_kept(const Tensor& t, int64_t batch, int64_t tokens, int64_t width) {
    return t.scalar_type() == ScalarType::Float && t.dim() == 4 && t.size(0) == batch && t.size(1) == 1 &&
           t.size(2) == tokens && t.size(3) == width && t.stride(3) == 1 && (tokens == 1 || t.stride(2) == width);
}

const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

struct Linear {
    const Tensor &weight, &bias;  // (N, K), (N,)

    bool fits(int64_t n, int64_t k) const {
        return is_dense(weight) && is_dense(bias) && weight.dim() == 2 && weight.size(0) == n && weight.size(1) == k &&
               bias.numel() == n;
    }
    // out = W x + b
    void run(const VectorProducts& products, const float* x, float* out) const {
        products.dots(x, {data(weight), weight.size(0), weight.size(1), weight.size(1)}, out);
        for (int64_t i = 0; i < weight.size(0); ++i) out[i] += data(bias)[i];
    }
};

void normalise(Numbers& x, const Tensor& weight, const Tensor& bias, double eps) {
    const double size = static_cast<double>(x.size());
    double mean = 0, squares = 0;
    for (const float each : x) mean += each / size;
    for (const float each : x) squares += (each - mean) * (each - mean) / size;
    const double scale = 1 / std::sqrt(squares + eps);
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>((x[i] - mean) * scale) * data(weight)[i] + data(bias)[i];
    }
}

float activate(float x, int64_t kind) {
    switch (kind) {
        case kRelu:
            return std::max(x, 0.0f);
        case kSilu:
            return x / (1 + std::exp(-x));
        case kGelu:
            return static_cast<float>(0.5 * x * (1 + std::erf(x / kSqrt2)));
        default:
            return static_cast<float>(0.5 * x * (1 + std::tanh(kSqrt2OverPi * (x + 0.044715 * x * x * x))));
    }
}

// One query's attention over `keys`, of whose rows `slots` are of a token, to `values`; what is not visible has no
// part.
void attend(const VectorProducts& products, const float* q, StridedRows keys, const float* values, float scale,
            const bool* visible, int64_t slots, Numbers& scores, float* out) {
    scores.resize(keys.count);
    products.dots(q, keys, scores.data());
    float most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < keys.count; ++i) {
        scores[i] = visible == nullptr || visible[i / slots] ? scores[i] * scale : -INFINITY;
        most = std::max(most, scores[i]);
    }
    for (float& score : scores) sum += score = std::exp(score - most);
    for (float& score : scores) score /= sum;
    products.combine(scores.data(), {values, keys.count, keys.columns, keys.stride}, out);
}

Tensor side_step_(Tensor theta, Tensors parts, Tensor window, Tensor keys, std::optional<Tensor> visible,
                  Tensors fusion, Tensors encoder, int64_t own, double gate, int64_t heads, double eps_1, double eps_2,
                  int64_t activation) {
    const int64_t batch = theta.size(0), width = theta.size(1), tokens = keys.size(2);
    const bool is_gated = fusion.empty();
    STD_TORCH_CHECK(encoder.size() == 12 && (is_gated || fusion.size() == 3) && heads > 0 && width % heads == 0 &&
                        !parts.empty() && own < static_cast<int64_t>(parts.size()),
                    "side_step_ takes 12 tensors of an encoder and, without a gate, 3 of a cross-attention");
    const Linear qkv{encoder[0], encoder[1]}, output{encoder[2], encoder[3]};
    const Linear inner{encoder[4], encoder[5]}, outer{encoder[6], encoder[7]};
    const int64_t fused_heads = is_gated ? 0 : fusion[0].size(0) / width, slots = window.size(3) / width;
    const int64_t hidden = inner.weight.size(0);
    bool fits = are_rows(theta, batch) && are_kept(keys, batch, tokens, 2 * width) && qkv.fits(3 * width, width) &&
                output.fits(width, width) && inner.fits(hidden, width) && outer.fits(width, hidden) &&
                std::all_of(encoder.begin() + 8, encoder.end(),
                            [&](const Tensor& t) { return is_dense(t) && t.numel() == width; });
    int64_t given = 0;
    for (const Tensor& part : parts) {
        fits = fits && are_rows(part, batch);
        given += part.size(1);
    }
    if (is_gated) {
        fits = fits && given == width;
    } else {
        const Linear value{fusion[1], fusion[2]};
        fits = fits && given == slots * width && are_kept(window, batch, tokens, given) && is_dense(fusion[0]) &&
               fusion[0].dim() == 2 && fusion[0].size(1) == width && fused_heads * width == fusion[0].size(0) &&
               value.fits(width, fused_heads * width) && (own < 0 || parts[own].size(1) == width);
    }
    fits = fits && (!visible || (visible->scalar_type() == ScalarType::Bool && visible->dim() == 4 &&
                                 visible->size(3) == tokens && (tokens == 1 || visible->stride(3) == 1)));
    if (!fits || batch > kMostRows || batch * tokens * std::max(given, 2 * width) > kMostWork) {
        return by_aten("fastpeft::side_step__aten", theta, parts, window, keys, visible, fusion, encoder, own, gate,
                       heads, eps_1, eps_2, activation)[0];
    }

    Tensor out = torch::stable::new_empty(theta, {batch, width});
    const VectorProducts& products = choose_variant().vector_products;
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
        Numbers x(width), y(width), q(std::max<int64_t>(1, fused_heads) * width), states(3 * width), between(hidden);
        Numbers attended(q.size()), scores;
        for (int64_t b = begin; b < end; ++b) {
            const float* state = data(theta) + b * theta.stride(0);
            const auto part = [&](int64_t i) { return data(parts[i]) + b * parts[i].stride(0); };
            const bool* seen = !visible ? nullptr
                                        : static_cast<const bool*>(visible->const_data_ptr()) +
                                              (visible->size(0) == 1 ? 0 : b * visible->stride(0));
            if (is_gated) {
                for (int64_t i = 0; i < width; ++i) {
                    x[i] = part(0)[i] + static_cast<float>(gate) * (state[i] - part(0)[i]);
                }
            } else {
                float* const of_text = writable(window) + b * window.stride(0);
                float* last = of_text + (tokens - 1) * given;
                for (size_t i = 0; i < parts.size(); ++i) {
                    last = std::copy(part(i), part(i) + parts[i].size(1), last);
                }
                products.dots(state, {data(fusion[0]), fused_heads * width, width, width}, q.data());
                for (int64_t h = 0; h < fused_heads; ++h) {
                    const float* head = q.data() + h * width;
                    attend(products, head, {of_text, tokens * slots, width, width}, of_text, 1, seen, slots, scores,
                           attended.data() + h * width);
                }
                Linear{fusion[1], fusion[2]}.run(products, attended.data(), x.data());
                for (int64_t i = 0; own >= 0 && i < width; ++i) x[i] += part(own)[i];
            }
            qkv.run(products, x.data(), states.data());
            float* const kept = writable(keys) + b * keys.stride(0);
            std::copy(states.begin() + width, states.end(), kept + (tokens - 1) * 2 * width);
            const int64_t each = width / heads;
            const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(each)));
            for (int64_t h = 0; h < heads; ++h) {
                attend(products, states.data() + h * each, {kept + h * each, tokens, each, 2 * width},
                       kept + width + h * each, scale, seen, 1, scores, attended.data() + h * each);
            }
            output.run(products, attended.data(), y.data());
            for (int64_t i = 0; i < width; ++i) y[i] += x[i];
            normalise(y, encoder[8], encoder[9], eps_1);
            inner.run(products, y.data(), between.data());
            for (float& value : between) value = activate(value, activation);
            outer.run(products, between.data(), x.data());
            for (int64_t i = 0; i < width; ++i) x[i] += y[i];
            normalise(x, encoder[10], encoder[11], eps_2);
            std::copy(x.begin(), x.end(), writable(out) + b * width);
        }
    });
    return out;
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("side_step_", TORCH_BOX(&side_step_)); }

}  // namespace fastpeft
