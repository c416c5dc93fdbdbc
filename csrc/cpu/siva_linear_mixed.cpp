// fastpeft::siva_linear_mixed and its backward on CPU tensors: siva_linear_passes.h with the factors of several
// adapters.
//
// `order` only says which sentences, rows b of x with all their tokens, are whose: nothing is sorted, each tile is read
// and changed where it lies. It has rows of one sentence, or of several of one adapter that lie beside each other.
// Single rows that lie apart are not gathered: a tile of one row costs about twice as much a row as one of 64, and
// even there the products with W are a hundred times as much.
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

// The rows of x or dh as tiles of its adapters.
std::vector<Tile> tiles_of(const Tensor& of_rows, const std::vector<int64_t>& sizes, const Order& order) {
    const int64_t tokens = tokens_of(of_rows), number = of_rows.size(0);
    check(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }) &&
          std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == number);
    const std::vector<int64_t> places = sentences(order, number);
    std::vector<Tile> tiles;
    int64_t begin = 0;  // of the adapter's places
    for (size_t adapter = 0; adapter < sizes.size(); begin += sizes[adapter++]) {
        const int64_t end = begin + sizes[adapter];
        for (int64_t from = begin, to; from < end; from = to) {
            for (to = from + 1; to < end && places[to] == places[to - 1] + 1;) ++to;
            add_tiles(adapter, places[from] * tokens, (to - from) * tokens, (from - begin) * tokens, tiles);
        }
    }
    return tiles;
}

std::vector<Packed> adapters_of(const Tensors& us, const Tensors& ss, const Tensors& vs, size_t number) {
    check(number > 0 && us.size() == number && ss.size() == number && vs.size() == number && vs[0].dim() == 2);
    std::vector<Packed> found;
    for (size_t a = 0; a < number; ++a)
        found.emplace_back(Tensors{us[a]}, Tensors{ss[a]}, Tensors{vs[a]}, vs[0].size(1));
    return found;
}

std::tuple<Tensor, Tensors> siva_linear_mixed(Tensor x, Tensor weight, Tensors us, Tensors ss, Tensors vs,
                                              std::vector<int64_t> sizes, Order order, std::optional<Tensor> bias) {
    if (!is_for_here(x, ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_mixed_aten", x, weight, us, ss, vs, sizes, order, bias);
        return {found[0], Tensors(found.begin() + 1, found.end())};
    }
    const std::vector<Packed> adapters = adapters_of(us, ss, vs, sizes.size());
    const std::vector<Tile> tiles = tiles_of(x, sizes, order);
    Tensors ps;
    std::vector<ViewOf<float>> to;
    for (size_t a = 0; a < sizes.size(); ++a) {
        const int64_t rows = sizes[a] * tokens_of(x);
        ps.push_back(torch::stable::new_empty(x, {ss[a].numel(), rows}, ScalarType::Float));
        to.push_back({writable(ps[a]), rows, 1});
    }
    return {forward(x, {weight}, adapters, tiles, {bias}, to)[0], ps};
}

std::tuple<Tensor, Tensors, Tensors, Tensor> siva_linear_mixed_backward(Tensor dh, Tensor x, Tensor weight, Tensors us,
                                                                        Tensors ss, Tensors vs, Tensors ps,
                                                                        std::vector<int64_t> sizes, Order order,
                                                                        bool need_dx, Flags need_du, Flags need_dv,
                                                                        bool need_dbias) {
    const size_t number = sizes.size();
    if (!is_for_here(dh, ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_mixed_backward_aten", dh, x, weight, us, ss, vs, ps, sizes,
                                      order, need_dx, need_du, need_dv, need_dbias);
        const auto dus = found.begin() + 1, dvs = dus + number;
        return {found[0], Tensors(dus, dvs), Tensors(dvs, dvs + number), found.back()};
    }
    const std::vector<Packed> adapters = adapters_of(us, ss, vs, number);
    const std::vector<Tile> tiles = tiles_of(dh, sizes, order);
    check(ps.size() == number && need_du.size() == number && need_dv.size() == number);
    Needs needs{need_dx, {}, need_dv, {need_dbias}};
    std::vector<View> from;
    for (size_t a = 0; a < number; ++a) {
        check(!need_du[a] || is_matrix(ps[a], ss[a].numel(), sizes[a] * tokens_of(dh)));
        from.push_back(need_du[a] ? by_rows(ps[a]) : View{});
        needs.du.push_back({need_du[a]});
    }
    const Gradients found = backward({dh}, x, {weight}, adapters, tiles, from, needs);
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
