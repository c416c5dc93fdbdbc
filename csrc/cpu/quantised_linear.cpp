// fastpeft::quantised_linear and its backward on CPU tensors.
//
//     h = x W^T + b     dx = dh W     W (N, K), codes in 8 or 4 bits
//
// frozen_products.h has the product, which siva_linear.cpp needs too.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "by_aten.h"
#include "frozen_products.h"

namespace fastpeft {
namespace {

using namespace siva;

Tensor quantised_linear(Tensor x, Tensor codes, Tensor scales, int64_t out_features, std::optional<Tensor> bias) {
    if (!is_supported(x, {}))
        return by_aten("fastpeft::quantised_linear_aten", x, codes, scales, out_features, bias)[0];
    const Matrix rows(x);
    const Weight weight = quantised(codes, scales);
    check(out_features >= 0 && is_quantised(weight, out_features, rows.columns()) &&
          (!bias.has_value() || is_vector(*bias, out_features, rows.kind())));
    return quantised_product(x, rows, weight, out_features, rows.columns(), true, bias);
}

Tensor quantised_linear_backward(Tensor dh, Tensor codes, Tensor scales, int64_t in_features) {
    if (!is_supported(dh, {}))
        return by_aten("fastpeft::quantised_linear_backward_aten", dh, codes, scales, in_features)[0];
    const Matrix rows(dh);
    const Weight weight = quantised(codes, scales);
    check(in_features >= 0 && is_quantised(weight, rows.columns(), in_features));
    return quantised_product(dh, rows, weight, rows.columns(), in_features, false, std::nullopt);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("quantised_linear", TORCH_BOX(&quantised_linear));
    m.impl("quantised_linear_backward", TORCH_BOX(&quantised_linear_backward));
}

}  // namespace fastpeft
