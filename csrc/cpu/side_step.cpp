// fastpeft::side_step_ on CPU tensors in float32, for one token of each of a few texts. The matrices of a side block
// have D columns, some hundred at most, so that what other ways of computing it take is mostly their calls.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "by_aten.h"
#include "variants.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Numbers = std::vector<float>;

constexpr int64_t kMostRows = 8;        // texts; products of more are worth BLAS
constexpr int64_t kMostWork = 1 << 21;  // numbers of all windows; more are worth PyTorch's attention
constexpr int64_t kGrain = 1 << 13;     // numbers of a weight that are worth a thread, as they come from memory
constexpr double kSqrt2 = 1.4142135623730951, kSqrt2OverPi = 0.7978845608028654;

enum Activation { kRelu, kSilu, kGelu, kGeluTanh };  // in the order of fastpeft/ops/side_step.py

bool is_dense(const Tensor& t) { return t.scalar_type() == ScalarType::Float && t.is_contiguous(); }

// A row of B, each `width` wide and dense in itself.
bool are_rows(const Tensor& t, int64_t batch) {
    return t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == batch &&
           (t.size(1) < 2 || t.stride(1) == 1);
}

// (B, 1, T, width), of which tokens lie beside each other, and no text on another
bool are_kept(const Tensor& t, int64_t batch, int64_t tokens, int64_t width) {
    return t.scalar_type() == ScalarType::Float && t.dim() == 4 && t.size(0) == batch && t.size(1) == 1 && tokens > 0 &&
           t.size(2) == tokens && t.size(3) == width && t.stride(3) == 1 && (tokens == 1 || t.stride(2) == width) &&
           (batch < 2 || t.stride(0) >= tokens * width);
}

// bool (B or 1, 1, 1, T), each row dense in itself
bool is_mask(const Tensor& t, int64_t batch, int64_t tokens) {
    return t.scalar_type() == ScalarType::Bool && t.dim() == 4 && (t.size(0) == 1 || t.size(0) == batch) &&
           t.size(1) == 1 && t.size(2) == 1 && t.size(3) == tokens && (tokens == 1 || t.stride(3) == 1);
}

const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// Matrices and vectors that lie one after the other.
class Weights {
  public:
    explicit Weights(const float* first) : next_(first) {}

    const float* take(int64_t count) {
        const float* const found = next_;
        next_ += count;
        return found;
    }

  private:
    const float* next_;
};

// W (n, k), and b (n,) after it
struct Linear {
    Linear(Weights& from, int64_t n, int64_t k) : weight{from.take(n * k), n, k, k}, bias(from.take(n)) {}

    void run(const VectorProducts& products, const float* x, float* out) const {  // out = W x + b
        const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, weight.columns));
        torch::stable::parallel_for(0, weight.count, grain, [&](int64_t begin, int64_t end) {
            products.dots(x, weight.some(begin, end), out + begin);
            for (int64_t i = begin; i < end; ++i) out[i] += bias[i];
        });
    }

    const StridedRows weight;
    const float* const bias;
};

struct Norm {
    Norm(Weights& from, int64_t size, double eps) : weight(from.take(size)), bias(from.take(size)), eps(eps) {}

    void run(float* x, int64_t size) const {
        double mean = 0, squares = 0;
        for (int64_t i = 0; i < size; ++i) mean += x[i];
        mean /= static_cast<double>(size);
        for (int64_t i = 0; i < size; ++i) squares += (x[i] - mean) * (x[i] - mean);
        const double scale = 1 / std::sqrt(squares / static_cast<double>(size) + eps);
        for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>((x[i] - mean) * scale) * weight[i] + bias[i];
    }

    const float *const weight, *const bias;
    const double eps;
};

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

// A block as `weights` has it: the cross-attention's Q, V and c where there are heads of it, then the encoder.
struct Block {
    Block(Weights from, int64_t width, int64_t hidden, int64_t fused_heads, double eps_1, double eps_2)
        : query{from.take(fused_heads * width * width), fused_heads * width, width, width},
          value(from, fused_heads > 0 ? width : 0, fused_heads * width),
          qkv(from, 3 * width, width),
          output(from, width, width),
          inner(from, hidden, width),
          outer(from, width, hidden),
          norm_1(from, width, eps_1),
          norm_2(from, width, eps_2) {}

    static int64_t size(int64_t width, int64_t hidden, int64_t fused_heads) {
        const int64_t fusion = fused_heads > 0 ? (2 * fused_heads * width + 1) * width : 0;
        return fusion + (4 * width + 2 * hidden) * width + 9 * width + hidden;
    }

    const StridedRows query;
    const Linear value, qkv, output, inner, outer;
    const Norm norm_1, norm_2;
};

// parts (B, N, k, D) at these places = W feature + b, the feature over its root mean square if `eps` is not 0
void project(const VectorProducts& products, const Tensor& feature, const Tensor& weight, const Tensor& bias,
             const std::vector<int64_t>& places, double eps, const Tensor& parts, int64_t width) {
    const int64_t size = feature.size(1), rows = weight.size(0);
    for (int64_t b = 0; b < feature.size(0); ++b) {
        const float* const x = data(feature) + b * feature.stride(0);
        float* const to = writable(parts) + b * parts.stride(0);
        double squares = 0;
        for (int64_t i = 0; eps > 0 && i < size; ++i) squares += static_cast<double>(x[i]) * x[i];
        const float scale =
            eps > 0 && size > 0 ? static_cast<float>(1 / std::sqrt(squares / static_cast<double>(size) + eps)) : 1;
        const float* const added = data(bias);
        const StridedRows of_weight = {data(weight), rows, size, size};
        const int64_t half = (width + 1) / 2;  // of a part, so that one part has work for two threads
        const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size * half));
        torch::stable::parallel_for(0, 2 * (rows / width), grain, [&](int64_t begin, int64_t end) {
            for (int64_t unit = begin; unit < end; ++unit) {
                const int64_t r = unit / 2, first = unit % 2 * half, last = std::min(first + half, width);
                float* const part = to + places[r] * width;
                products.dots(x, of_weight.some(r * width + first, r * width + last), part + first);
                for (int64_t i = first; i < last; ++i) part[i] = part[i] * scale + added[r * width + i];
            }
        });
    }
}

Tensor side_step_(Tensor feature, Tensor theta, Tensor parts, Tensor weight, Tensor bias, std::vector<int64_t> places,
                  double eps, int64_t number, Tensor block, Tensor window, Tensor keys, std::optional<Tensor> visible,
                  int64_t hidden, int64_t fused_heads, int64_t own, double gate, int64_t heads, double eps_1,
                  double eps_2, int64_t activation) {
    STD_TORCH_CHECK(
        feature.dim() == 2 && theta.dim() == 2 && theta.size(1) > 0 && parts.dim() == 4 && keys.dim() == 4 &&
            window.dim() == 4 && hidden >= 0 && fused_heads >= 0,
        "side_step_ takes feature (B, d), theta (B, D), parts (B, N, k, D) and what is kept (B, 1, T, ...)");
    const int64_t batch = theta.size(0), width = theta.size(1), slots = parts.size(2), tokens = keys.size(2);
    const int64_t readers = static_cast<int64_t>(places.size()), given = slots * width;
    STD_TORCH_CHECK(number < parts.size(1) && (number < 0 || tokens > 0) && own < slots && heads > 0 &&
                        width % heads == 0 &&
                        std::all_of(places.begin(), places.end(),
                                    [&](int64_t place) { return place >= 0 && place < parts.size(1) * slots; }),
                    "side_step_ takes parts (B, N, k, D), blocks and slots inside of it, and heads that divide D");
    bool fits =
        are_rows(feature, batch) && are_rows(theta, batch) && is_dense(parts) && parts.size(0) == batch &&
        parts.size(3) == width && is_dense(weight) && is_dense(bias) && bias.numel() == readers * width &&
        (readers == 0 || (weight.dim() == 2 && weight.size(0) == readers * width && weight.size(1) == feature.size(1)));
    if (number >= 0) {
        fits = fits && is_dense(block) && block.numel() == Block::size(width, hidden, fused_heads) &&
               are_kept(keys, batch, tokens, 2 * width) &&
               (fused_heads == 0 ? slots == 1 : are_kept(window, batch, tokens, given)) &&
               (!visible || is_mask(*visible, batch, tokens));
    }
    if (!fits || batch > kMostRows || batch * tokens * std::max(given, 2 * width) > kMostWork) {
        return by_aten("fastpeft::side_step__aten", feature, theta, parts, weight, bias, places, eps, number, block,
                       window, keys, visible, hidden, fused_heads, own, gate, heads, eps_1, eps_2, activation)[0];
    }

    const VectorProducts& products = choose_variant().vector_products;
    if (readers > 0) project(products, feature, weight, bias, places, eps, parts, width);
    Tensor out = torch::stable::new_empty(theta, {batch, width});
    if (number < 0) {
        torch::stable::copy_(out, theta);
        return out;
    }
    const Block all(Weights(data(block)), width, hidden, fused_heads, eps_1, eps_2);
    const int64_t each = width / heads;
    const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(each)));
    float* const windows = fused_heads > 0 ? writable(window) : nullptr;  // a lazy clone is copied before threads run
    float* const all_keys = writable(keys);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
        Numbers x(width), y(width), q(std::max<int64_t>(1, fused_heads) * width), attended(q.size());
        Numbers states(3 * width), between(hidden), scores;
        for (int64_t b = begin; b < end; ++b) {
            const float* const state = data(theta) + b * theta.stride(0);
            const float* const part = data(parts) + b * parts.stride(0) + number * given;
            const bool* seen = nullptr;
            if (visible) {
                seen = static_cast<const bool*>(visible->const_data_ptr());
                if (visible->size(0) > 1) seen += b * visible->stride(0);
            }
            if (fused_heads == 0) {
                for (int64_t i = 0; i < width; ++i) x[i] = part[i] + static_cast<float>(gate) * (state[i] - part[i]);
            } else {
                float* const kept = windows + b * window.stride(0);
                std::copy(part, part + given, kept + (tokens - 1) * given);
                products.dots(state, all.query, q.data());
                for (int64_t h = 0; h < fused_heads; ++h) {
                    attend(products, q.data() + h * width, {kept, tokens * slots, width, width}, kept, 1, seen, slots,
                           scores, attended.data() + h * width);
                }
                all.value.run(products, attended.data(), x.data());
                for (int64_t i = 0; own >= 0 && i < width; ++i) x[i] += part[own * width + i];
                for (int64_t i = 0; gate != 0.0 && i < width; ++i) x[i] += static_cast<float>(gate) * state[i];
            }
            all.qkv.run(products, x.data(), states.data());
            float* const kept = all_keys + b * keys.stride(0);
            std::copy(states.begin() + width, states.end(), kept + (tokens - 1) * 2 * width);
            for (int64_t h = 0; h < heads; ++h) {
                attend(products, states.data() + h * each, {kept + h * each, tokens, each, 2 * width},
                       kept + width + h * each, scale, seen, 1, scores, attended.data() + h * each);
            }
            all.output.run(products, attended.data(), y.data());
            for (int64_t i = 0; i < width; ++i) y[i] += x[i];
            all.norm_1.run(y.data(), width);
            all.inner.run(products, y.data(), between.data());
            for (float& value : between) value = activate(value, activation);
            float* const found = writable(out) + b * width;
            all.outer.run(products, between.data(), found);
            for (int64_t i = 0; i < width; ++i) found[i] += y[i];
            all.norm_2.run(found, width);
        }
    });
    return out;
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("side_step_", TORCH_BOX(&side_step_)); }

}  // namespace fastpeft
