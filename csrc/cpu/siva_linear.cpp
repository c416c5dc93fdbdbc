// fastpeft::siva_linear, siva_linear_group and their backward on CPU tensors.
//
//     h = b + (p * s) U^T + x W^T     p = x V^T          M rows of x, K in, N out, R rank
//     dx = dp V + dh W                dp = (dh U) * s    x (M, K)   W (N, K)   U (N, R)   V (R, K)   p, dp (M, R)
//     dU = (dh^T p) * s               dV = dp^T x
//
// The products with W are BLAS's. Everything else is one pass over rows before them: it writes what they are added to,
// in the place of the copy of the bias that they would need anyway. Forward it reads x and writes h, backward it reads
// dh and x and writes dx, each once, a tile of rows that stays in cache at a time. One layer is a group of one.
//
// dU and dV are sums over rows: those of a chunk of rows are added up tile after tile, then the chunks' sums one after
// the other. Chunks depend on the number of rows alone, so the threads that run them do not change a bit.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "choose.h"

namespace fastpeft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Biases = std::vector<std::optional<Tensor>>;
using Flags = std::vector<bool>;

constexpr int64_t kMaxRank = 64;    // of one layer; for more of them BLAS is as good
constexpr int64_t kTile = 64;       // rows that are worked on at one time
constexpr int64_t kMaxChunks = 64;  // of rows with sums of their own
constexpr int64_t kWork = 1 << 17;  // multiply-adds below which another thread costs more than it saves

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t padded(int64_t ranks) { return ceil_div(ranks, kRankBlock) * kRankBlock; }

// -- what is not computed here ------------------------------------------------------------------------------------

template <typename T>
StableIValue box(const T& value) {
    return torch::stable::detail::from(value);
}

StableIValue box(const Flags& flags) {  // whose elements have no address
    const std::unique_ptr<bool[]> copy(new bool[flags.size()]);
    std::copy(flags.begin(), flags.end(), copy.get());
    return torch::stable::detail::from(torch::headeronly::HeaderOnlyArrayRef<bool>(copy.get(), flags.size()));
}

// The results of the same op by ATen's calls (fastpeft/aten.py, put there by fastpeft/backends.py) as one list: torch
// takes the types of several results in the wrong order.
template <typename... Arguments>
Tensors by_aten(const char* op, const Arguments&... arguments) {
    std::array<StableIValue, sizeof...(Arguments)> stack{box(arguments)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensors>(stack[0]);
}

bool is_for_here(const Tensor& x, const Tensors& ss) {
    return x.scalar_type() == ScalarType::Float &&
           std::all_of(ss.begin(), ss.end(), [](const Tensor& s) { return s.numel() <= kMaxRank; });
}

// -- operands -----------------------------------------------------------------------------------------------------

void check(bool fits) { STD_TORCH_CHECK(fits, "siva_linear takes float32 tensors whose shapes fit together"); }

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns) {
    return t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

bool is_vector(const Tensor& t, int64_t size) {
    return t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == size;
}

// (*, columns) as (M, columns), each row without gaps.
class Matrix {
  public:
    explicit Matrix(const Tensor& t) : tensor_(t) {
        check(t.scalar_type() == ScalarType::Float && t.dim() > 0);
        const int64_t columns = t.size(t.dim() - 1);
        int64_t rows = 1;
        for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
        if (t.dim() != 2) tensor_ = torch::stable::reshape(t, {rows, columns});
        if (tensor_.stride(1) != 1 || tensor_.stride(0) < columns) tensor_ = torch::stable::contiguous(tensor_);
    }

    const Tensor& tensor() const { return tensor_; }
    int64_t rows() const { return tensor_.size(0); }
    int64_t columns() const { return tensor_.size(1); }
    Rows part(int64_t first, int64_t count) const {
        float* data = static_cast<float*>(tensor_.mutable_data_ptr());
        return {data + first * tensor_.stride(0), count, tensor_.stride(0)};
    }

  private:
    Tensor tensor_;
};

// The shape of x or dh but for its last dimension.
Tensor new_rows(const Tensor& like, int64_t columns) {
    std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    sizes.back() = columns;
    return torch::stable::new_empty(like, sizes);
}

// out += a b, by BLAS
void add_product(const Matrix& out, const Matrix& a, const Tensor& b) {
    AtenTensorHandle target = out.tensor().get();
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(target, target, a.tensor().get(), b.get(), 1.0, 1.0));
}

using Buffer = std::unique_ptr<float[]>;
Buffer new_buffer(int64_t size) { return Buffer(new float[size]); }

// A strided matrix of the caller, one of its dimensions being ranks.
struct View {
    const float* data;
    int64_t rank_stride, other_stride;
};

const float* data_of(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
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
        const float* row = from.data + r * from.rank_stride;
        for (int64_t i = 0; i < columns; ++i) to[i] = row[i * from.other_stride] * scale;
    }
}

// Of a group of layers: all V below each other (sum of R, K), and each diag(s) U^T (R, N).
class Packed {
  public:
    Packed(const Tensors& weights, const Tensors& us, const Tensors& ss, const Tensors& vs, int64_t k)
        : ranks(ss), k_(k) {
        check(us.size() == weights.size() && ss.size() == weights.size() && vs.size() == weights.size());
        v_ = new_buffer(ranks.total * k);
        for (size_t i = 0; i < weights.size(); ++i) {
            const int64_t n = us[i].size(0), r = ranks.count[i];
            check(is_matrix(weights[i], n, k) && is_matrix(us[i], n, r) && is_matrix(vs[i], r, k) &&
                  is_vector(ss[i], r));
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
    int64_t multiply_adds() const {  // for one row
        return ranks.total * (k_ + std::accumulate(columns_.begin(), columns_.end(), int64_t{0}));
    }

    const Ranks ranks;

  private:
    int64_t k_;
    Buffer v_;
    std::vector<Buffer> scaled_u_;
    std::vector<int64_t> columns_;
};

// Coefficients of some rows: those of one layer begin at its first rank.
Rows of_layer(Rows coefficients, const Ranks& ranks, size_t layer) {
    return {coefficients.data + ranks.start[layer], coefficients.count, coefficients.stride};
}

// run(first row, number of rows) for all tiles of the rows begin .. end - 1
template <typename Run>
void each_tile(int64_t begin, int64_t end, const Run& run) {
    for (int64_t first = begin; first < end; first += kTile) run(first, std::min(kTile, end - first));
}

template <typename Run>
void parallel_chunks(int64_t chunks, int64_t multiply_adds, const Run& run) {
    const int64_t grain = std::max<int64_t>(1, kWork / std::max<int64_t>(1, multiply_adds));
    torch::stable::parallel_for(0, chunks, grain, run);
}

// -- forward ------------------------------------------------------------------------------------------------------

// The outputs; p goes to where `p` says, without padding.
Tensors forward(const Tensor& x, const Tensors& weights, const Tensors& us, const Tensors& ss, const Tensors& vs,
                const Biases& biases, float* p, int64_t p_row, int64_t p_rank) {
    const Matrix rows(x);
    const Packed packed(weights, us, ss, vs, rows.columns());
    const Ranks& ranks = packed.ranks;
    const LowRank& run = choose_variant().low_rank;
    check(biases.size() == weights.size());
    Tensors outputs;
    std::vector<Matrix> targets;
    std::vector<Tensor> starts;  // contiguous biases
    std::vector<const float*> start(weights.size(), nullptr);
    for (size_t i = 0; i < weights.size(); ++i) {
        outputs.push_back(new_rows(x, weights[i].size(0)));
        targets.emplace_back(outputs.back());
        if (biases[i].has_value()) {
            check(is_vector(*biases[i], weights[i].size(0)));
            starts.push_back(torch::stable::contiguous(*biases[i]));
            start[i] = data_of(starts.back());
        }
    }
    const auto tile = [&](int64_t first, int64_t count, Rows projected) {
        run.project(rows.part(first, count), packed.v(), projected);
        for (size_t i = 0; i < weights.size(); ++i) {
            const Rows own = of_layer(projected, ranks, i);
            run.expand(own, packed.scaled_u(i), start[i], targets[i].part(first, count));
            for (int64_t m = 0; m < count; ++m) {
                for (int64_t r = 0; r < ranks.count[i]; ++r) {
                    p[(first + m) * p_row + (ranks.first[i] + r) * p_rank] = own.data[m * own.stride + r];
                }
            }
        }
    };
    parallel_chunks(ceil_div(rows.rows(), kTile), kTile * packed.multiply_adds(), [&](int64_t begin, int64_t end) {
        const Buffer projected = new_buffer(kTile * ranks.total);
        each_tile(begin * kTile, std::min(end * kTile, rows.rows()),
                  [&](int64_t first, int64_t count) { tile(first, count, {projected.get(), count, ranks.total}); });
    });
    for (size_t i = 0; i < weights.size(); ++i) {
        add_product(targets[i], rows, torch::stable::transpose(weights[i], 0, 1));
    }
    return outputs;
}

std::tuple<Tensor, Tensor> siva_linear(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v,
                                       std::optional<Tensor> bias) {
    if (!is_for_here(x, {s})) {
        const Tensors found = by_aten("fastpeft::siva_linear_aten", x, weight, u, s, v, bias);
        return {found[0], found[1]};
    }
    check(x.dim() > 0);
    Tensor p = new_rows(x, s.numel());
    float* data = static_cast<float*>(p.mutable_data_ptr());
    Tensors h = forward(x, {weight}, {u}, {s}, {v}, {bias}, data, s.numel(), 1);
    return {h[0], p};
}

std::tuple<Tensors, Tensor> siva_linear_group(Tensor x, Tensors weights, Tensors us, Tensors ss, Tensors vs,
                                              Biases biases) {
    if (!is_for_here(x, ss)) {
        Tensors found = by_aten("fastpeft::siva_linear_group_aten", x, weights, us, ss, vs, biases);
        return {Tensors(found.begin(), found.end() - 1), found.back()};
    }
    check(x.dim() > 0);
    const int64_t sum = Ranks(ss).sum, m = Matrix(x).rows();
    Tensor p = torch::stable::new_empty(x, {sum, m});
    float* data = static_cast<float*>(p.mutable_data_ptr());
    return {forward(x, weights, us, ss, vs, biases, data, 1, m), p};
}

// -- backward -----------------------------------------------------------------------------------------------------

struct Needs {
    bool dx;
    Flags du;
    bool dv;
    Flags dbias;
};

struct Gradients {
    Tensor dx;
    Tensors du;
    Tensor dv;
    Tensors dbias;
};

// Sums over the rows of each chunk, (chunks, ranks, columns).
class Partial {
  public:
    Partial(bool needed, int64_t chunks, int64_t ranks, int64_t columns)
        : needed_(needed), chunks_(chunks), ranks_(ranks), columns_(columns) {
        if (needed) data_ = new_buffer(chunks * ranks * columns);
    }

    bool needed() const { return needed_; }
    int64_t ranks() const { return ranks_; }
    int64_t columns() const { return columns_; }

    float* start(int64_t chunk) const {
        float* sums = data_.get() + chunk * ranks_ * columns_;
        std::fill(sums, sums + ranks_ * columns_, 0.0f);
        return sums;
    }

    // to[i * to_stride] = scale * (the sum over all chunks for this rank), for all columns i
    void total(int64_t rank, float scale, float* to, int64_t to_stride) const {
        for (int64_t i = 0; i < columns_; ++i) {
            float sum = 0.0f;
            for (int64_t c = 0; c < chunks_; ++c) sum += data_[(c * ranks_ + rank) * columns_ + i];
            to[i * to_stride] = sum * scale;
        }
    }

  private:
    bool needed_;
    int64_t chunks_, ranks_, columns_;
    Buffer data_;
};

// p is read where `p` says: of row m and rank r of all layers, at p.data[m * p.other_stride + r * p.rank_stride].
Gradients backward(const Tensors& dhs, const Tensor& x, const Tensors& weights, const Tensors& us, const Tensors& ss,
                   const Tensors& vs, View p, const Needs& needs) {
    check(!dhs.empty() && dhs.size() == weights.size() && needs.du.size() == weights.size() &&
          needs.dbias.size() == weights.size());
    std::vector<Matrix> dh(dhs.begin(), dhs.end());
    const int64_t m = dh[0].rows(), k = weights[0].size(1);
    const Packed packed(weights, us, ss, vs, k);
    const Ranks& ranks = packed.ranks;
    const LowRank& run = choose_variant().low_rank;
    const int64_t chunk_rows = kTile * std::max<int64_t>(1, ceil_div(m, kTile * kMaxChunks));
    const int64_t chunks = ceil_div(m, chunk_rows);

    const auto nothing = [&] { return torch::stable::new_empty(dhs[0], {0}); };
    Gradients out{needs.dx ? new_rows(dhs[0], k) : nothing(), {}, nothing(), {}};
    if (needs.dv) out.dv = torch::stable::new_empty(dhs[0], {ranks.sum, k});
    std::optional<Matrix> rows, dx;
    if (needs.dv) rows.emplace(x);
    if (needs.dx) dx.emplace(out.dx);
    check(!needs.dv || (rows->rows() == m && rows->columns() == k));

    const Partial of_v(needs.dv, chunks, ranks.total, k);
    std::vector<Partial> of_u;
    for (size_t i = 0; i < dh.size(); ++i) {
        check(dh[i].rows() == m && dh[i].columns() == weights[i].size(0));
        of_u.emplace_back(needs.du[i], chunks, ranks.padded_count(i), dh[i].columns());
        out.du.push_back(needs.du[i] ? torch::stable::new_empty(us[i], us[i].sizes()) : nothing());
        out.dbias.push_back(needs.dbias[i] ? torch::stable::sum(dh[i].tensor(), std::vector<int64_t>{0}) : nothing());
    }

    const auto chunk = [&](int64_t c, float* buffer) {
        float* sums_v = needs.dv ? of_v.start(c) : nullptr;
        std::vector<float*> sums_u;
        for (const Partial& partial : of_u) sums_u.push_back(partial.needed() ? partial.start(c) : nullptr);
        each_tile(c * chunk_rows, std::min(m, (c + 1) * chunk_rows), [&](int64_t first, int64_t count) {
            const Rows coefficients = {buffer, count, ranks.total};
            for (size_t i = 0; i < dh.size(); ++i) {
                if (!needs.du[i]) continue;
                const Rows own = of_layer(coefficients, ranks, i);
                for (int64_t row = 0; row < count; ++row) {
                    float* to = own.data + row * own.stride;
                    const float* from = p.data + (first + row) * p.other_stride + ranks.first[i] * p.rank_stride;
                    for (int64_t r = 0; r < ranks.count[i]; ++r) to[r] = from[r * p.rank_stride];
                    std::fill(to + ranks.count[i], to + ranks.padded_count(i), 0.0f);
                }
                run.reduce(own, dh[i].part(first, count), ranks.padded_count(i), dh[i].columns(), sums_u[i]);
            }
            if (!needs.dx && !needs.dv) return;
            for (size_t i = 0; i < dh.size(); ++i) {  // dp, in the place of p
                run.project(dh[i].part(first, count), packed.scaled_u(i), of_layer(coefficients, ranks, i));
            }
            if (needs.dx) run.expand(coefficients, packed.v(), nullptr, dx->part(first, count));
            if (needs.dv) run.reduce(coefficients, rows->part(first, count), ranks.total, k, sums_v);
        });
    };
    parallel_chunks(chunks, chunk_rows * packed.multiply_adds(), [&](int64_t begin, int64_t end) {
        const Buffer buffer = new_buffer(kTile * ranks.total);
        for (int64_t c = begin; c < end; ++c) chunk(c, buffer.get());
    });

    for (size_t i = 0; i < dh.size(); ++i) {
        for (int64_t r = 0; r < ranks.count[i]; ++r) {
            if (needs.dv) {
                float* to = static_cast<float*>(out.dv.mutable_data_ptr()) + (ranks.first[i] + r) * k;
                of_v.total(ranks.start[i] + r, 1.0f, to, 1);
            }
            if (needs.du[i]) {
                float* to = static_cast<float*>(out.du[i].mutable_data_ptr()) + r;
                of_u[i].total(r, data_of(ss[i])[r * ss[i].stride(0)], to, ranks.count[i]);
            }
        }
        if (needs.dx) add_product(*dx, dh[i], weights[i]);
    }
    return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> siva_linear_backward(Tensor dh, Tensor x, Tensor weight, Tensor u, Tensor s,
                                                                Tensor v, Tensor p, bool need_dx, bool need_du,
                                                                bool need_dv, bool need_dbias) {
    if (!is_for_here(dh, {s})) {
        const Tensors found = by_aten("fastpeft::siva_linear_backward_aten", dh, x, weight, u, s, v, p, need_dx,
                                      need_du, need_dv, need_dbias);
        return {found[0], found[1], found[2], found[3]};
    }
    std::optional<Matrix> projected;
    if (need_du) projected.emplace(p);
    check(!need_du || is_matrix(projected->tensor(), Matrix(dh).rows(), s.numel()));
    Gradients found = backward({dh}, x, {weight}, {u}, {s}, {v}, need_du ? by_columns(projected->tensor()) : View{},
                               {need_dx, {need_du}, need_dv, {need_dbias}});
    return {found.dx, found.du[0], found.dv, found.dbias[0]};
}

std::tuple<Tensor, Tensors, Tensor, Tensors> siva_linear_group_backward(Tensors dhs, Tensor x, Tensors weights,
                                                                        Tensors us, Tensors ss, Tensors vs, Tensor p,
                                                                        bool need_dx, Flags need_du, bool need_dv,
                                                                        Flags need_dbias) {
    check(!dhs.empty());
    if (!is_for_here(dhs[0], ss)) {
        const Tensors found = by_aten("fastpeft::siva_linear_group_backward_aten", dhs, x, weights, us, ss, vs, p,
                                      need_dx, need_du, need_dv, need_dbias);
        const auto dv = found.begin() + 1 + us.size();
        return {found[0], Tensors(found.begin() + 1, dv), *dv, Tensors(dv + 1, found.end())};
    }
    const bool any_du = std::find(need_du.begin(), need_du.end(), true) != need_du.end();
    check(!any_du || is_matrix(p, Ranks(ss).sum, Matrix(dhs[0]).rows()));
    Gradients found =
        backward(dhs, x, weights, us, ss, vs, any_du ? by_rows(p) : View{}, {need_dx, need_du, need_dv, need_dbias});
    return {found.dx, found.du, found.dv, found.dbias};
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/_ops.py
STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
    m.impl("siva_linear", TORCH_BOX(&siva_linear));
    m.impl("siva_linear_backward", TORCH_BOX(&siva_linear_backward));
    m.impl("siva_linear_group", TORCH_BOX(&siva_linear_group));
    m.impl("siva_linear_group_backward", TORCH_BOX(&siva_linear_group_backward));
}

}  // namespace fastpeft
