// fastpeft::siva_linear_mixed and its backward on CPU tensors: siva_linear_passes.h with the factors of several
// adapters.
//
// `order` only says which sentences, rows b of x with all their tokens, are whose: x and h are not sorted, the rows of
// a tile are read and changed where they lie.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "by_aten.h"
#include "siva_linear_passes.h"

namespace fastpeft {
namespace {

using namespace siva;
using Order = std::optional<Tensor>;

// The number of tokens of a sentence.
int64_t tokens_of(const Tensor& x) {
    check(x.dim() > 1);
    int64_t tokens = 1;
    for (int64_t d = 1; d + 1 < x.dim(); ++d) tokens *= x.size(d);
    return tokens;
}

// Which sentence is at each place of the order of the adapters.
std::vector<int64_t> sentences(const Order& order, int64_t number) {
    std::vector<int64_t> found(number);
    if (!order.has_value()) {
        std::iota(found.begin(), found.end(), 0);
        return found;
    }
    check(order->is_cpu() && is_vector(*order, number, ScalarType::Long));
    const int64_t* const data = static_cast<const int64_t*>(order->const_data_ptr());
    Flags seen(number, false);
    bool is_permutation = true;
    for (int64_t i = 0; i < number; ++i) {
        const int64_t sentence = found[i] = data[i * order->stride(0)];
        is_permutation = is_permutation && 0 <= sentence && sentence < number && !seen[sentence];
        if (is_permutation) seen[sentence] = true;
    }
    if (!is_permutation) {
        std::string text;
        for (const int64_t sentence : found) text += (text.empty() ? "" : ", ") + std::to_string(sentence);
        STD_TORCH_CHECK(false, "siva_linear_mixed: order is [", text,
                        "], so some rows of h would stay unwritten; allowed is each of 0 to ", number - 1,
                        " once. Give the permutation that sorts the rows by adapter.");
    }
    return found;
}

// The numbers of all rows of x or dh, in the order of the adapters.
std::vector<int64_t> row_indices(const Tensor& x, const Order& order) {
    const int64_t tokens = tokens_of(x);
    std::vector<int64_t> rows;
    rows.reserve(x.size(0) * tokens);
    for (const int64_t sentence : sentences(order, x.size(0))) {
        for (int64_t t = 0; t < tokens; ++t) rows.push_back(sentence * tokens + t);
    }
    return rows;
}

// How many rows of x or dh each adapter has.
std::vector<int64_t> counts_of(const Tensor& x, std::vector<int64_t> sizes) {
    const int64_t tokens = tokens_of(x);
    check(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }) &&
          std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == x.size(0));
    for (int64_t& size : sizes) size *= tokens;
    return sizes;
}

std::vector<GroupFactors> adapters_of(const Tensors& us, const Tensors& ss, const Tensors& vs, size_t number) {
    check(number > 0 && us.size() == number && ss.size() == number && vs.size() == number && vs[0].dim() == 2);
    std::vector<GroupFactors> found;
    for (size_t a = 0; a < number; ++a) {
        found.emplace_back(Tensors{us[a]}, Tensors{ss[a]}, Tensors{vs[a]}, vs[0].size(1));
    }
    return found;
}

std::tuple<Tensor, Tensors> siva_linear_mixed(Tensor x, Tensor weight, Tensors us, Tensors ss, Tensors vs,
                                              std::vector<int64_t> sizes, Order order, std::optional<Tensor> bias) {
    if (!is_supported(x, ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_mixed_aten", x, weight, us, ss, vs, sizes, order, bias);
        return {found[0], Tensors(found.begin() + 1, found.end())};
    }
    const std::vector<GroupFactors> adapters = adapters_of(us, ss, vs, sizes.size());
    const std::vector<int64_t> counts = counts_of(x, sizes), rows = row_indices(x, order);
    Tensors ps;
    std::vector<ViewOf<float>> to;
    for (size_t a = 0; a < sizes.size(); ++a) {
        ps.push_back(torch::stable::new_empty(x, {ss[a].numel(), counts[a]}, ScalarType::Float));
        to.push_back({writable(ps[a]), counts[a], 1});
    }
    return {forward(x, {{weight}}, adapters, tiles_of(rows, counts), {bias}, to)[0], ps};
}

std::tuple<Tensor, Tensors, Tensors, Tensor> siva_linear_mixed_backward(Tensor dh, Tensor x, Tensor weight, Tensors us,
                                                                        Tensors ss, Tensors vs, Tensors ps,
                                                                        std::vector<int64_t> sizes, Order order,
                                                                        bool need_dx, Flags need_du, Flags need_dv,
                                                                        bool need_dbias) {
    const size_t number = sizes.size();
    if (!is_supported(dh, ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_mixed_backward_aten", dh, x, weight, us, ss, vs, ps, sizes,
                                      order, need_dx, need_du, need_dv, need_dbias);
        const auto dus = found.begin() + 1, dvs = dus + number;
        return {found[0], Tensors(dus, dvs), Tensors(dvs, dvs + number), found.back()};
    }
    const std::vector<GroupFactors> adapters = adapters_of(us, ss, vs, number);
    const std::vector<int64_t> counts = counts_of(dh, sizes), rows = row_indices(dh, order);
    check(ps.size() == number && need_du.size() == number && need_dv.size() == number);
    Needs needs{need_dx, {}, need_dv, {need_dbias}};
    std::vector<View> from;
    for (size_t a = 0; a < number; ++a) {
        check(!need_du[a] || is_matrix(ps[a], ss[a].numel(), counts[a]));
        from.push_back(need_du[a] ? by_rows(ps[a]) : View{});
        needs.du.push_back({need_du[a]});
    }
    const Gradients found = backward({dh}, x, {{weight}}, adapters, tiles_of(rows, counts), from, needs);
    Tensors dus;
    for (const Tensors& du : found.du) dus.push_back(du[0]);
    return {found.dx, dus, found.dv, found.dbias[0]};
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops; a call with a pack has a key of its own
#define FASTPEFT_IMPLEMENTATIONS(key)                                                 \
    STABLE_TORCH_LIBRARY_IMPL(fastpeft, key, m) {                                     \
        m.impl("siva_linear_mixed", TORCH_BOX(&siva_linear_mixed));                   \
        m.impl("siva_linear_mixed_backward", TORCH_BOX(&siva_linear_mixed_backward)); \
    }

FASTPEFT_IMPLEMENTATIONS(CPU)
FASTPEFT_IMPLEMENTATIONS(MkldnnCPU)

}  // namespace fastpeft
