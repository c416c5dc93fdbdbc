// fastpeft::siva_linear, siva_linear_quantised and their backward on CPU tensors:
// siva_linear_passes.h with one adapter, whose factors all rows take. One layer is a group of one.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <utility>

#include "by_aten.h"
#include "siva_linear_passes.h"

namespace fastpeft {
namespace {

using namespace siva;

// One adapter and the rows of x or dh, which all take its factors.
struct Alone {
    Alone(const Tensor& of_rows, const Tensors& us, const Tensors& ss, const Tensors& vs) {
        check(!vs.empty() && vs[0].dim() == 2);
        adapters.emplace_back(us, ss, vs, vs[0].size(1));
        rows.resize(num_rows(of_rows));
        std::iota(rows.begin(), rows.end(), 0);
        tiles = tiles_of(rows, {static_cast<int64_t>(rows.size())});
    }

    std::vector<GroupFactors> adapters;
    std::vector<int64_t> rows;
    std::vector<Tile> tiles;
};

std::tuple<Tensor, Tensor> layer(const Tensor& x, const Weight& weight, const Tensor& u, const Tensor& s,
                                 const Tensor& v, const std::optional<Tensor>& bias) {
    check(x.dim() > 0);
    Tensor p = new_rows(x, s.numel(), ScalarType::Float);
    const Alone all(x, {u}, {s}, {v});
    Tensors h = forward(x, {weight}, all.adapters, all.tiles, {bias}, {{writable(p), 1, s.numel()}});
    return {h[0], p};
}

std::tuple<Tensor, Tensor> siva_linear_quantised(Tensor x, Tensor codes, Tensor scales, Tensor u, Tensor s, Tensor v,
                                                 std::optional<Tensor> bias) {
    if (is_supported(x, {s})) return layer(x, quantised(codes, scales), u, s, v, bias);
    const Tensors found = by_aten("fastpeft::siva_linear_quantised_aten", x, codes, scales, u, s, v, bias);
    return {found[0], found[1]};
}

std::tuple<Tensors, Tensor> siva_linear(Tensor x, Tensors weights, Tensors us, Tensors ss, Tensors vs, Biases biases) {
    if (!is_supported(x, ss)) {
        Tensors found = by_aten("fastpeft::siva_linear_aten", x, weights, us, ss, vs, biases);
        return {Tensors(found.begin(), found.end() - 1), found.back()};
    }
    const int64_t sum = Ranks(ss).sum, m = num_rows(x);
    Tensor p = torch::stable::new_empty(x, {sum, m}, ScalarType::Float);
    const Alone all(x, us, ss, vs);
    return {forward(x, dense(weights), all.adapters, all.tiles, biases, {{writable(p), m, 1}}), p};
}

using LayerGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

LayerGradients layer_backward(const Tensor& dh, const Tensor& x, const Weight& weight, const Tensor& u, const Tensor& s,
                              const Tensor& v, const Tensor& p, int64_t trained, bool need_dx, bool need_du,
                              bool need_dv, bool need_dbias) {
    std::optional<Matrix> projected;
    if (need_du) projected.emplace(p);
    check(!need_du || is_matrix(projected->tensor(), num_rows(dh), trained));
    const Alone all(dh, {u}, {s}, {v});
    const View of_p = need_du ? by_columns(projected->tensor()) : View{};
    Gradients found = backward({dh}, x, {weight}, all.adapters, all.tiles, {of_p},
                               {need_dx, {{need_du}}, {need_dv}, {need_dbias}, trained});
    return {found.dx, found.du[0][0], found.dv[0], found.dbias[0]};
}

LayerGradients siva_linear_quantised_backward(Tensor dh, Tensor x, Tensor codes, Tensor scales, Tensor u, Tensor s,
                                              Tensor v, Tensor p, bool need_dx, bool need_du, bool need_dv,
                                              bool need_dbias) {
    if (is_supported(dh, {s})) {
        const int64_t trained = need_du || need_dv ? p.size(p.dim() - 1) : s.numel();
        return layer_backward(dh, x, quantised(codes, scales), u, s, v, p, trained, need_dx, need_du, need_dv,
                              need_dbias);
    }
    const Tensors found = by_aten("fastpeft::siva_linear_quantised_backward_aten", dh, x, codes, scales, u, s, v, p,
                                  need_dx, need_du, need_dv, need_dbias);
    return {found[0], found[1], found[2], found[3]};
}

std::tuple<Tensor, Tensors, Tensor, Tensors> siva_linear_backward(Tensors dhs, Tensor x, Tensors weights, Tensors us,
                                                                  Tensors ss, Tensors vs, Tensor p, bool need_dx,
                                                                  Flags need_du, bool need_dv, Flags need_dbias) {
    check(!dhs.empty());
    if (!is_supported(dhs[0], ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_backward_aten", dhs, x, weights, us, ss, vs, p, need_dx,
                                      need_du, need_dv, need_dbias);
        const auto dv = found.begin() + 1 + us.size();
        return {found[0], Tensors(found.begin() + 1, dv), *dv, Tensors(dv + 1, found.end())};
    }
    const bool any_du = std::find(need_du.begin(), need_du.end(), true) != need_du.end();
    check(!any_du || is_matrix(p, Ranks(ss).sum, num_rows(dhs[0])));
    const Alone all(dhs[0], us, ss, vs);
    Gradients found = backward(dhs, x, dense(weights), all.adapters, all.tiles, {any_du ? by_rows(p) : View{}},
                               {need_dx, {need_du}, {need_dv}, need_dbias});
    return {found.dx, found.du[0], found.dv[0], found.dbias};
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops; a call with a pack has a key of its own
#define FASTPEFT_IMPLEMENTATIONS(key)                                     \
    STABLE_TORCH_LIBRARY_IMPL(fastpeft, key, m) {                         \
        m.impl("siva_linear", TORCH_BOX(&siva_linear));                   \
        m.impl("siva_linear_backward", TORCH_BOX(&siva_linear_backward)); \
    }

FASTPEFT_IMPLEMENTATIONS(CPU)
FASTPEFT_IMPLEMENTATIONS(MkldnnCPU)

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("siva_linear_quantised", TORCH_BOX(&siva_linear_quantised));
    m.impl("siva_linear_quantised_backward", TORCH_BOX(&siva_linear_quantised_backward));
}

}  // namespace fastpeft
