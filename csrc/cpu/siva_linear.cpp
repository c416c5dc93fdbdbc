// fastpeft::siva_linear and its backward on CPU tensors:
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

std::tuple<Tensors, Tensor> siva_linear(Tensor x, Tensors weights, Optionals scales, Tensors us, Tensors ss, Tensors vs,
                                        Optionals biases) {
    if (!is_supported(x, ss)) {
        Tensors found = by_aten("fastpeft::siva_linear_aten", x, weights, scales, us, ss, vs, biases);
        return {Tensors(found.begin(), found.end() - 1), found.back()};
    }
    const int64_t sum = Ranks(ss).sum, m = num_rows(x);
    Tensor p = torch::stable::new_empty(x, {sum, m}, ScalarType::Float);
    const Alone all(x, us, ss, vs);
    return {forward(x, frozen(weights, scales), all.adapters, all.tiles, biases, {{writable(p), m, 1}}), p};
}

std::tuple<Tensor, Tensors, Tensor, Tensors> siva_linear_backward(Tensors dhs, Tensor x, Tensors weights,
                                                                  Optionals scales, Tensors us, Tensors ss, Tensors vs,
                                                                  Tensor p, bool need_dx, Flags need_du, bool need_dv,
                                                                  Flags need_dbias) {
    check(!dhs.empty());
    if (!is_supported(dhs[0], ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_backward_aten", dhs, x, weights, scales, us, ss, vs, p,
                                      need_dx, need_du, need_dv, need_dbias);
        const auto dv = found.begin() + 1 + us.size();
        return {found[0], Tensors(found.begin() + 1, dv), *dv, Tensors(dv + 1, found.end())};
    }
    const bool any_du = std::find(need_du.begin(), need_du.end(), true) != need_du.end();
    check(!any_du || is_matrix(p, Ranks(ss).sum, num_rows(dhs[0])));
    const Alone all(dhs[0], us, ss, vs);
    Gradients found = backward(dhs, x, frozen(weights, scales), all.adapters, all.tiles, {any_du ? by_rows(p) : View{}},
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

}  // namespace fastpeft
