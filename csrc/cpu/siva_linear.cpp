// fastpeft::siva_linear and its backward on CPU tensors:
//
//     h = b + (p * s) U^T + x W^T     p = x V^T          M rows of x, K in, N out, R rank
//     dx = dp V + dh W                dp = (dh U) * s    x (M, K)   W (N, K)   U (N, R)   V (R, K)   p, dp (M, R)
//     dU = (dh^T p) * s               dV = dp^T x
//
// x, W, h and their gradients are float32 or bfloat16, the factors, p and the factors' gradients float32. The products
// with W and the bias come first: by oneDNN where W is packed, else by ATen. Everything else is one pass over rows that
// adds to what they wrote. Forward it reads x and changes h, backward it reads dh and x and changes dx, each once, a
// tile of rows that stays in cache at a time. One layer is a group of one; the factors of all layers of a group are
// read at one time. Or there is one layer and several adapters, and the rows of a tile take the factors of one of them:
// then `order` only says which sentences, rows b of x with all their tokens, are whose. x and h are not sorted, the
// rows of a tile are read and changed where they lie.
//
// dU and dV are sums over rows: those of a chunk of rows of an adapter are added up tile after tile, then the chunks'
// sums one after the other. Chunks depend on the tiles alone, so the threads that run them do not change a bit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "by_aten.h"
#include "frozen_products.h"

namespace fastpeft {
namespace {

using namespace siva;
using Sizes = std::vector<int64_t>;
using Order = std::optional<Tensor>;

constexpr int64_t kTile = 64;            // rows that are worked on at one time
constexpr int64_t kMaxChunks = 64;       // of rows with sums of their own, but for the last one of each adapter
constexpr int64_t kGrainWork = 1 << 17;  // multiply-adds below which another thread costs more than it saves

int64_t padded(int64_t ranks) { return ceil_div(ranks, kRankBlock) * kRankBlock; }

// -- factors ------------------------------------------------------------------------------------------------------

using Buffer = std::unique_ptr<float[]>;
Buffer new_buffer(int64_t size) { return Buffer(new float[size]); }

// A strided matrix of the caller, one of its dimensions being ranks.
template <typename T>
struct ViewOf {
    T* data;
    int64_t rank_stride, other_stride;

    T* at(int64_t rank, int64_t other) const { return data + rank * rank_stride + other * other_stride; }
};
using View = ViewOf<const float>;

const float* data_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* writable(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
View by_rows(const Tensor& t) { return {data_of(t), t.stride(0), t.stride(1)}; }
View by_columns(const Tensor& t) { return {data_of(t), t.stride(1), t.stride(0)}; }

// The ranks of all layers of a group, one after the other; each layer's are padded to blocks.
struct Ranks {
    explicit Ranks(const Tensors& ss) {
        for (const Tensor& s : ss) {
            start.push_back(total);
            first.push_back(sum);
            count.push_back(s.numel());
            total += padded(s.numel());
            sum += s.numel();
        }
    }

    int64_t padded_count(size_t layer) const { return padded(count[layer]); }

    std::vector<int64_t> start, first, count;  // of each layer: its place with padding and without, its ranks
    int64_t total = 0, sum = 0;                // with padding and without
};

// U (N, R) as diag(s) U^T (R, N), or V (R, K) as it is: without gaps, with zeros for the ranks of the padding.
void pack(View from, const Tensor* s, int64_t ranks, int64_t columns, float* to) {
    for (int64_t r = 0; r < padded(ranks); ++r, to += columns) {
        if (r >= ranks) {
            std::fill(to, to + columns, 0.0f);
            continue;
        }
        const float scale = s == nullptr ? 1.0f : data_of(*s)[r * s->stride(0)];
        for (int64_t i = 0; i < columns; ++i) to[i] = *from.at(r, i) * scale;
    }
}

// The factors of a group of layers: all V below each other (sum of R, K), and each diag(s) U^T (R, N).
class GroupFactors {
  public:
    GroupFactors(const Tensors& us, const Tensors& ss, const Tensors& vs, int64_t k) : ranks(ss), ss_(ss), k_(k) {
        check(!us.empty() && ss.size() == us.size() && vs.size() == us.size());
        v_ = new_buffer(ranks.total * k);
        for (size_t i = 0; i < us.size(); ++i) {
            const int64_t n = us[i].size(0), r = ranks.count[i];
            check(is_matrix(us[i], n, r) && is_matrix(vs[i], r, k) && is_vector(ss[i], r));
            pack(by_rows(vs[i]), nullptr, r, k, v_.get() + ranks.start[i] * k);
            scaled_u_.push_back(new_buffer(padded(r) * n));
            pack(by_columns(us[i]), &ss[i], r, n, scaled_u_.back().get());
            columns_.push_back(n);
        }
    }

    Factors v() const { return {v_.get(), ranks.total, k_}; }
    Factors scaled_u(size_t layer) const {
        return {scaled_u_[layer].get(), ranks.padded_count(layer), columns_[layer]};
    }
    float scale(size_t layer, int64_t rank) const { return data_of(ss_[layer])[rank * ss_[layer].stride(0)]; }
    // do the layers have these weights, (N, K), or where they are packed for backward (K, N)?
    bool fit(const Weights& weights, ScalarType kind, bool for_backward = false) const {
        bool fits = weights.size() == columns_.size();
        for (size_t i = 0; fits && i < weights.size(); ++i) {
            const Tensor& values = weights[i].values;
            fits = weights[i].scales.has_value()       ? is_quantised(weights[i], columns_[i], k_)
                   : for_backward && is_packed(values) ? is_matrix(values, k_, columns_[i], kind)
                                                       : is_matrix(values, columns_[i], k_, kind);
        }
        return fits;
    }
    size_t layers() const { return columns_.size(); }
    int64_t columns(size_t layer) const { return columns_[layer]; }
    int64_t multiply_adds() const {  // for one row
        return ranks.total * (k_ + std::accumulate(columns_.begin(), columns_.end(), int64_t{0}));
    }

    const Ranks ranks;

  private:
    Tensors ss_;
    int64_t k_;
    Buffer v_;
    std::vector<Buffer> scaled_u_;
    std::vector<int64_t> columns_;
};

// Rows of x that take the factors of one adapter, wherever they are.
struct Tile {
    size_t adapter;
    const int64_t* rows;  // their numbers
    int64_t count;
    int64_t place;  // of the first among the adapter's rows, as p has them
};

// The first sizes[0] of `rows` take the factors of the first adapter, and so on.
std::vector<Tile> tiles_of(const std::vector<int64_t>& rows, const std::vector<int64_t>& sizes) {
    std::vector<Tile> tiles;
    const int64_t* next = rows.data();
    for (size_t adapter = 0; adapter < sizes.size(); next += sizes[adapter++]) {
        for (int64_t place = 0; place < sizes[adapter]; place += kTile) {
            tiles.push_back({adapter, next + place, std::min(kTile, sizes[adapter] - place), place});
        }
    }
    return tiles;
}

// Coefficients of some rows: those of one layer begin at its first rank.
Rows of_layer(Rows coefficients, const Ranks& ranks, size_t layer) {
    return {coefficients.data + ranks.start[layer], coefficients.stride};
}

// run(begin, end, buffer) for all of `parts` of the rows of `tiles`; the buffer has room for the coefficients of a tile
template <typename Run>
void parallel(size_t parts, const std::vector<Tile>& tiles, const std::vector<GroupFactors>& adapters, const Run& run) {
    int64_t work = 0, ranks = 0;
    for (const Tile& tile : tiles) work += tile.count * adapters[tile.adapter].multiply_adds();
    for (const GroupFactors& adapter : adapters) ranks = std::max(ranks, adapter.ranks.total);
    const int64_t grain = ceil_div(kGrainWork * static_cast<int64_t>(parts), std::max<int64_t>(1, work));
    torch::stable::parallel_for(0, parts, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
        const Buffer buffer = new_buffer(kTile * ranks);
        run(begin, end, buffer.get());
    });
}

template <typename T>
const LowRankOf<T>& low_rank();
template <>
const LowRankOf<float>& low_rank() {
    return choose_variant().low_rank.of_float;
}
template <>
const LowRankOf<BFloat16>& low_rank() {
#if defined(__x86_64__)
    if (has_bfloat16()) return avx512bf16::low_rank;
#endif
    return choose_variant().low_rank.of_bfloat;
}

// -- forward ------------------------------------------------------------------------------------------------------

// The low-rank part is added to each of `targets`; the p of an adapter goes to where `ps` says, without padding.
template <typename T>
void add_low_rank(const Matrix& rows, const std::vector<GroupFactors>& adapters, const std::vector<Tile>& tiles,
                  const std::vector<Matrix>& targets, const std::vector<ViewOf<float>>& ps) {
    const LowRankOf<T>& run = low_rank<T>();
    parallel(tiles.size(), tiles, adapters, [&](int64_t begin, int64_t end, float* buffer) {
        for (int64_t t = begin; t < end; ++t) {
            const auto [adapter, numbers, count, place] = tiles[t];
            const GroupFactors& factors = adapters[adapter];
            const Ranks& ranks = factors.ranks;
            const Rows projected = {buffer, ranks.total};
            run.project(rows.some<T>(numbers, count), factors.v(), projected);
            for (size_t i = 0; i < targets.size(); ++i) {
                const Rows own = of_layer(projected, ranks, i);
                run.expand(own, factors.scaled_u(i), targets[i].some<T>(numbers, count));
                for (int64_t m = 0; m < count; ++m) {
                    for (int64_t r = 0; r < ranks.count[i]; ++r) {
                        *ps[adapter].at(ranks.first[i] + r, place + m) = own.data[m * own.stride + r];
                    }
                }
            }
        }
    });
}

// The outputs of all layers; p as above.
Tensors forward(const Tensor& x, const Weights& weights, const std::vector<GroupFactors>& adapters,
                const std::vector<Tile>& tiles, const Optionals& biases, const std::vector<ViewOf<float>>& ps) {
    const Matrix rows(x);
    check(biases.size() == weights.size());
    for (const GroupFactors& factors : adapters) {
        check(factors.v().columns == rows.columns() && factors.fit(weights, rows.kind()));
    }
    Tensors outputs;
    std::vector<Matrix> targets;
    for (size_t i = 0; i < weights.size(); ++i) {
        const auto& [values, scales] = weights[i];
        const int64_t n = adapters[0].columns(i);
        check(!biases[i].has_value() || is_vector(*biases[i], n, rows.kind()));
        outputs.push_back(scales.has_value()
                              ? quantised_product(x, rows, weights[i], n, rows.columns(), true, biases[i])
                              : product(x, rows, values, biases[i]));
        targets.emplace_back(outputs.back());
    }
    const auto add = rows.kind() == ScalarType::Float ? add_low_rank<float> : add_low_rank<BFloat16>;
    add(rows, adapters, tiles, targets, ps);
    return outputs;
}

// -- backward -----------------------------------------------------------------------------------------------------

struct Needs {
    bool dx;
    Flags du;  // of each adapter's layers
    bool dv;
    Flags dbias;  // of each layer
};

using Gradients = std::tuple<Tensor, Tensors, Tensor, Tensors>;

// Some tiles of an adapter, and which of its chunks they are.
struct Chunk {
    size_t adapter;
    int64_t number;
    size_t begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<Tile>& tiles, int64_t m) {
    const int64_t enough = kTile * std::max<int64_t>(1, ceil_div(m, kTile * kMaxChunks));
    std::vector<Chunk> chunks;
    int64_t rows = 0;
    for (size_t t = 0; t < tiles.size(); ++t) {
        const size_t adapter = tiles[t].adapter;
        const bool is_first = chunks.empty() || chunks.back().adapter != adapter;
        if (is_first || rows >= enough) {
            chunks.push_back({adapter, is_first ? 0 : chunks.back().number + 1, t, t});
            rows = 0;
        }
        chunks.back().end = t + 1;
        rows += tiles[t].count;
    }
    return chunks;
}

// Sums over the rows of each chunk, (chunks, ranks, columns).
class Partial {
  public:
    Partial(bool needed, int64_t chunks, int64_t ranks, int64_t columns)
        : needed_(needed), chunks_(chunks), ranks_(ranks), columns_(columns) {
        if (needed) data_ = new_buffer(chunks * ranks * columns);
    }

    bool needed() const { return needed_; }

    void clear(int64_t chunk) const {
        if (needed_) std::fill(at(chunk), at(chunk + 1), 0.0f);
    }
    float* at(int64_t chunk) const { return data_.get() + chunk * ranks_ * columns_; }

    // to[i * to_stride] = scale * (the sum over all chunks for this rank), for all columns i; `sum` has room for a rank
    void total(int64_t rank, float scale, float* to, int64_t to_stride, float* sum) const {
        std::fill(sum, sum + columns_, 0.0f);
        for (int64_t c = 0; c < chunks_; ++c) {
            const float* part = at(c) + rank * columns_;
            for (int64_t i = 0; i < columns_; ++i) sum[i] += part[i];
        }
        for (int64_t i = 0; i < columns_; ++i) to[i * to_stride] = sum[i] * scale;
    }

  private:
    bool needed_;
    int64_t chunks_, ranks_, columns_;
    Buffer data_;
};

// The sums of an adapter.
struct Sums {
    std::vector<Partial> of_u;
    Partial of_v;
};

// The sum of all dh W.
Tensor times(const Tensors& dhs, const std::vector<Matrix>& rows, const Weights& weights, int64_t k) {
    Tensors dense_dhs, dense;
    std::vector<Matrix> dense_rows;
    for (size_t i = 0; i < weights.size(); ++i) {
        if (weights[i].scales.has_value()) continue;
        dense_dhs.push_back(dhs[i]);
        dense_rows.push_back(rows[i]);
        dense.push_back(weights[i].values);
    }
    std::optional<Tensor> sum;
    if (!dense.empty()) sum = sum_of_products(dense_dhs, dense_rows, dense, k);
    for (size_t i = 0; i < weights.size(); ++i) {
        if (!weights[i].scales.has_value()) continue;
        sum = quantised_product(dhs[i], rows[i], weights[i], rows[i].columns(), k, false, std::nullopt, sum);
    }
    return *sum;
}

// p is read where `ps` says.
template <typename T>
Gradients backward_of(const Tensors& dhs, const Tensor& x, const Weights& weights,
                      const std::vector<GroupFactors>& adapters, const std::vector<Tile>& tiles,
                      const std::vector<View>& ps, const Needs& needs) {
    const std::vector<Matrix> dh(dhs.begin(), dhs.end());
    const ScalarType kind = dh[0].kind();
    const int64_t m = dh[0].rows(), k = adapters[0].v().columns;
    const LowRankOf<T>& run = low_rank<T>();
    check(needs.dbias.size() == dh.size() && needs.du.size() == adapters.size() * dh.size());
    for (size_t a = 0; a < adapters.size(); ++a) {
        const GroupFactors& factors = adapters[a];
        check(factors.layers() == dh.size());
        check(factors.v().columns == k && (!needs.dx || factors.fit(weights, kind, true)));
        for (size_t i = 0; i < dh.size(); ++i) {
            check(dh[i].kind() == kind && dh[i].rows() == m && dh[i].columns() == factors.columns(i));
        }
    }

    const auto nothing = [&](ScalarType of) { return torch::stable::new_empty(dhs[0], {0}, of); };
    const Tensor out = needs.dx ? times(dhs, dh, weights, k) : nothing(kind);
    Tensors dus, dbiases;
    std::optional<Matrix> rows, dx;
    if (needs.dv) {
        rows.emplace(x);
        check(rows->kind() == kind && rows->rows() == m && rows->columns() == k);
    }
    if (needs.dx) dx.emplace(out);
    for (size_t i = 0; i < dh.size(); ++i) {
        dbiases.push_back(needs.dbias[i] ? torch::stable::sum(dh[i].tensor(), std::vector<int64_t>{0}) : nothing(kind));
    }

    const std::vector<Chunk> chunks = chunks_of(tiles, m);
    std::vector<int64_t> counts(adapters.size(), 0);
    for (const Chunk& chunk : chunks) ++counts[chunk.adapter];
    std::vector<Sums> sums;
    for (size_t a = 0; a < adapters.size(); ++a) {
        const Ranks& ranks = adapters[a].ranks;
        sums.push_back({{}, Partial(needs.dv, counts[a], ranks.total, k)});
        for (size_t i = 0; i < dh.size(); ++i) {
            sums[a].of_u.emplace_back(needs.du[a * dh.size() + i], counts[a], ranks.padded_count(i), dh[i].columns());
        }
    }

    const auto run_chunk = [&](const Chunk& chunk, float* buffer) {
        const GroupFactors& factors = adapters[chunk.adapter];
        const Ranks& ranks = factors.ranks;
        const auto& [of_u, of_v] = sums[chunk.adapter];
        for (const Partial& partial : of_u) partial.clear(chunk.number);
        of_v.clear(chunk.number);
        for (size_t t = chunk.begin; t < chunk.end; ++t) {
            const auto [adapter, numbers, count, place] = tiles[t];
            const Rows coefficients = {buffer, ranks.total};
            for (size_t i = 0; i < dh.size(); ++i) {
                if (!of_u[i].needed()) continue;
                const Rows own = of_layer(coefficients, ranks, i);
                for (int64_t row = 0; row < count; ++row) {
                    float* to = own.data + row * own.stride;
                    for (int64_t r = 0; r < ranks.count[i]; ++r) {
                        to[r] = *ps[adapter].at(ranks.first[i] + r, place + row);
                    }
                    std::fill(to + ranks.count[i], to + ranks.padded_count(i), 0.0f);
                }
                run.reduce(own, dh[i].some<T>(numbers, count), ranks.padded_count(i), dh[i].columns(),
                           of_u[i].at(chunk.number));
            }
            if (!needs.dx && !of_v.needed()) continue;
            for (size_t i = 0; i < dh.size(); ++i) {  // dp, in the place of p
                run.project(dh[i].some<T>(numbers, count), factors.scaled_u(i), of_layer(coefficients, ranks, i));
            }
            if (needs.dx) run.expand(coefficients, factors.v(), dx->some<T>(numbers, count));
            if (of_v.needed()) {
                run.reduce(coefficients, rows->some<T>(numbers, count), ranks.total, k, of_v.at(chunk.number));
            }
        }
    };
    parallel(chunks.size(), tiles, adapters, [&](int64_t begin, int64_t end, float* buffer) {
        for (int64_t c = begin; c < end; ++c) run_chunk(chunks[c], buffer);
    });

    const auto matrix = [&](bool needed, int64_t of_rows, int64_t columns) {
        return needed ? torch::stable::new_empty(dhs[0], {of_rows, columns}, ScalarType::Float)
                      : nothing(ScalarType::Float);
    };
    int64_t longest = k;
    for (const Matrix& each : dh) longest = std::max(longest, each.columns());
    const Buffer sum = new_buffer(longest);
    int64_t all_ranks = 0, first = 0;
    for (const GroupFactors& factors : adapters) all_ranks += factors.ranks.sum;
    const Tensor dv = matrix(needs.dv, all_ranks, k);
    for (size_t a = 0; a < adapters.size(); ++a) {
        const Ranks& ranks = adapters[a].ranks;
        const auto& [of_u, of_v] = sums[a];
        for (size_t i = 0; i < dh.size(); ++i) {
            dus.push_back(matrix(of_u[i].needed(), dh[i].columns(), ranks.count[i]));
            for (int64_t r = 0; r < ranks.count[i]; ++r) {
                if (of_u[i].needed()) {
                    of_u[i].total(r, adapters[a].scale(i, r), writable(dus.back()) + r, ranks.count[i], sum.get());
                }
                if (of_v.needed()) {
                    of_v.total(ranks.start[i] + r, 1.0f, writable(dv) + (first + ranks.first[i] + r) * k, 1, sum.get());
                }
            }
        }
        first += ranks.sum;
    }
    return {out, dus, dv, dbiases};
}

Gradients backward(const Tensors& dhs, const Tensor& x, const Weights& weights,
                   const std::vector<GroupFactors>& adapters, const std::vector<Tile>& tiles,
                   const std::vector<View>& ps, const Needs& needs) {
    const auto run = dhs[0].scalar_type() == ScalarType::Float ? backward_of<float> : backward_of<BFloat16>;
    return run(dhs, x, weights, adapters, tiles, ps, needs);
}

// -- rows of several adapters ------------------------------------------------------------------------------------

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

// -- operations ---------------------------------------------------------------------------------------------------

// The adapters of a batch and the rows of x or dh that take the factors of each: without `sizes` all those of one.
struct Batch {
    Batch(const Tensor& of_rows, const Tensors& us, const Tensors& ss, const Tensors& vs, const Sizes& sizes,
          const Order& order) {
        check(!vs.empty() && vs[0].dim() == 2);
        const int64_t k = vs[0].size(1);
        if (sizes.empty()) {
            adapters.emplace_back(us, ss, vs, k);
            counts.push_back(num_rows(of_rows));
            rows.resize(counts[0]);
            std::iota(rows.begin(), rows.end(), 0);
        } else {
            check(us.size() == sizes.size() && ss.size() == sizes.size() && vs.size() == sizes.size());
            const int64_t tokens = tokens_of(of_rows);
            int64_t sum = 0;
            for (size_t a = 0; a < sizes.size(); ++a) {
                check(sizes[a] >= 0);
                sum += sizes[a];
                adapters.emplace_back(Tensors{us[a]}, Tensors{ss[a]}, Tensors{vs[a]}, k);
                counts.push_back(sizes[a] * tokens);
            }
            check(sum == of_rows.size(0));
            rows = row_indices(of_rows, order);
        }
        tiles = tiles_of(rows, counts);
    }

    // Where the p of each adapter is, or shall be, and how many numbers all have.
    template <typename T>
    std::pair<std::vector<ViewOf<T>>, int64_t> views(T* p) const {
        std::vector<ViewOf<T>> found;
        int64_t place = 0;
        for (size_t a = 0; a < adapters.size(); ++a) {
            found.push_back({p + place, counts[a], 1});
            place += adapters[a].ranks.sum * counts[a];
        }
        return {found, place};
    }

    std::vector<GroupFactors> adapters;
    std::vector<int64_t> counts, rows;
    std::vector<Tile> tiles;
};

std::tuple<Tensors, Tensor> siva_linear(Tensor x, Tensors weights, Optionals scales, Tensors us, Tensors ss, Tensors vs,
                                        Optionals biases, Sizes sizes, Order order) {
    if (!is_supported(x, ss)) {
        Tensors found = by_aten("fastpeft::siva_linear_aten", x, weights, scales, us, ss, vs, biases, sizes, order);
        return {Tensors(found.begin(), found.end() - 1), found.back()};
    }
    const Batch batch(x, us, ss, vs, sizes, order);
    const int64_t numbers = batch.views<float>(nullptr).second;
    const std::vector<int64_t> shape = sizes.empty() ? Sizes{batch.adapters[0].ranks.sum, num_rows(x)} : Sizes{numbers};
    Tensor p = torch::stable::new_empty(x, shape, ScalarType::Float);
    return {forward(x, frozen(weights, scales), batch.adapters, batch.tiles, biases, batch.views(writable(p)).first),
            p};
}

Gradients siva_linear_backward(Tensors dhs, Tensor x, Tensors weights, Optionals scales, Tensors us, Tensors ss,
                               Tensors vs, Tensor p, bool need_dx, Flags need_du, bool need_dv, Flags need_dbias,
                               Sizes sizes, Order order) {
    check(!dhs.empty());
    if (!is_supported(dhs[0], ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_backward_aten", dhs, x, weights, scales, us, ss, vs, p,
                                      need_dx, need_du, need_dv, need_dbias, sizes, order);
        const auto dv = found.begin() + 1 + us.size();
        return {found[0], Tensors(found.begin() + 1, dv), *dv, Tensors(dv + 1, found.end())};
    }
    const Batch batch(dhs[0], us, ss, vs, sizes, order);
    const Tensor dense = torch::stable::contiguous(p);
    const auto [ps, numbers] = batch.views(data_of(dense));
    if (std::find(need_du.begin(), need_du.end(), true) != need_du.end()) {
        check(sizes.empty() ? is_matrix(p, batch.adapters[0].ranks.sum, num_rows(dhs[0])) : is_vector(p, numbers));
    }
    return backward(dhs, x, frozen(weights, scales), batch.adapters, batch.tiles, ps,
                    {need_dx, need_du, need_dv, need_dbias});
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
