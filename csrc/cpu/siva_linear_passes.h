// The passes over rows of siva_linear.cpp and siva_linear_mixed.cpp:
//
//     h = b + (p * s) U^T + x W^T     p = x V^T          M rows of x, K in, N out, R rank
//     dx = dp V + dh W                dp = (dh U) * s    x (M, K)   W (N, K)   U (N, R)   V (R, K)   p, dp (M, R)
//     dU = (dh^T p) * s               dV = dp^T x
//
// x, W, h and their gradients are float32 or bfloat16, the factors, p and the factors' gradients float32. The products
// with W and the bias come first: by oneDNN where W is packed, else by ATen. Everything else is one pass over rows that
// adds to what they wrote. Forward it reads x and changes h, backward it reads dh and x and changes dx, each once, a
// tile of rows that stays in cache at a time. The rows of a tile take the factors of one adapter; those of all layers
// of a group are read at one time.
//
// dU and dV are sums over rows: those of a chunk of rows of an adapter are added up tile after tile, then the chunks'
// sums one after the other. Chunks depend on the tiles alone, so the threads that run them do not change a bit.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "choose.h"
#include "siva_linear_parts.h"

namespace fastpeft {
namespace siva {

constexpr int64_t kTile = 64;            // rows that are worked on at one time
constexpr int64_t kMaxChunks = 64;       // of rows with sums of their own, but for the last one of each adapter
constexpr int64_t kGrainWork = 1 << 17;  // multiply-adds below which another thread costs more than it saves

// Rows of x that take the factors of one adapter, wherever they are.
struct Tile {
    size_t adapter;
    const int64_t* rows;  // their numbers
    int64_t count;
    int64_t place;  // of the first among the adapter's rows, as p has them
};

// The first sizes[0] of `rows` take the factors of the first adapter, and so on.
inline std::vector<Tile> tiles_of(const std::vector<int64_t>& rows, const std::vector<int64_t>& sizes) {
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
inline Rows of_layer(Rows coefficients, const Ranks& ranks, size_t layer) {
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
inline const LowRankOf<float>& low_rank() {
    return choose_variant().low_rank.of_float;
}
template <>
inline const LowRankOf<BFloat16>& low_rank() {
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
inline Tensors forward(const Tensor& x, const Weights& weights, const std::vector<GroupFactors>& adapters,
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
    std::vector<Flags> du;  // of each adapter's layers
    Flags dv;               // of each adapter
    Flags dbias;            // of each layer
};

struct Gradients {
    Tensor dx;
    std::vector<Tensors> du;
    Tensors dv, dbias;
};

// Some tiles of an adapter, and which of its chunks they are.
struct Chunk {
    size_t adapter;
    int64_t number;
    size_t begin, end;
};

inline std::vector<Chunk> chunks_of(const std::vector<Tile>& tiles, int64_t m) {
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
inline Tensor times(const Tensors& dhs, const std::vector<Matrix>& rows, const Weights& weights, int64_t k) {
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
    check(needs.dbias.size() == dh.size());
    for (size_t a = 0; a < adapters.size(); ++a) {
        const GroupFactors& factors = adapters[a];
        check(factors.layers() == dh.size() && needs.du[a].size() == dh.size());
        check(factors.v().columns == k && (!needs.dx || factors.fit(weights, kind, true)));
        for (size_t i = 0; i < dh.size(); ++i) {
            check(dh[i].kind() == kind && dh[i].rows() == m && dh[i].columns() == factors.columns(i));
        }
    }

    const auto nothing = [&](ScalarType of) { return torch::stable::new_empty(dhs[0], {0}, of); };
    Gradients out{needs.dx ? times(dhs, dh, weights, k) : nothing(kind), {}, {}, {}};
    std::optional<Matrix> rows, dx;
    if (std::find(needs.dv.begin(), needs.dv.end(), true) != needs.dv.end()) {
        rows.emplace(x);
        check(rows->kind() == kind && rows->rows() == m && rows->columns() == k);
    }
    if (needs.dx) dx.emplace(out.dx);
    for (size_t i = 0; i < dh.size(); ++i) {
        out.dbias.push_back(needs.dbias[i] ? torch::stable::sum(dh[i].tensor(), std::vector<int64_t>{0})
                                           : nothing(kind));
    }

    const std::vector<Chunk> chunks = chunks_of(tiles, m);
    std::vector<int64_t> counts(adapters.size(), 0);
    for (const Chunk& chunk : chunks) ++counts[chunk.adapter];
    std::vector<Sums> sums;
    for (size_t a = 0; a < adapters.size(); ++a) {
        const Ranks& ranks = adapters[a].ranks;
        sums.push_back({{}, Partial(needs.dv[a], counts[a], ranks.total, k)});
        for (size_t i = 0; i < dh.size(); ++i) {
            sums[a].of_u.emplace_back(needs.du[a][i], counts[a], ranks.padded_count(i), dh[i].columns());
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
    for (size_t a = 0; a < adapters.size(); ++a) {
        const Ranks& ranks = adapters[a].ranks;
        const auto& [of_u, of_v] = sums[a];
        out.dv.push_back(matrix(of_v.needed(), ranks.sum, k));
        out.du.emplace_back();
        for (size_t i = 0; i < dh.size(); ++i) {
            out.du[a].push_back(matrix(of_u[i].needed(), dh[i].columns(), ranks.count[i]));
            for (int64_t r = 0; r < ranks.count[i]; ++r) {
                if (of_u[i].needed()) {
                    of_u[i].total(r, adapters[a].scale(i, r), writable(out.du[a][i]) + r, ranks.count[i], sum.get());
                }
                if (of_v.needed()) {
                    of_v.total(ranks.start[i] + r, 1.0f, writable(out.dv[a]) + (ranks.first[i] + r) * k, 1, sum.get());
                }
            }
        }
    }
    return out;
}

inline Gradients backward(const Tensors& dhs, const Tensor& x, const Weights& weights,
                          const std::vector<GroupFactors>& adapters, const std::vector<Tile>& tiles,
                          const std::vector<View>& ps, const Needs& needs) {
    const auto run = dhs[0].scalar_type() == ScalarType::Float ? backward_of<float> : backward_of<BFloat16>;
    return run(dhs, x, weights, adapters, tiles, ps, needs);
}

}  // namespace siva
}  // namespace fastpeft
