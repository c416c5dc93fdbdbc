// fastpeft::siva_linear, siva_linear_group and their backward on CPU tensors.
//
//     h = b + (p * s) U^T + x W^T     p = x V^T          M rows of x, K in, N out, R rank
//     dx = dp V + dh W                dp = (dh U) * s    x (M, K)   W (N, K)   U (N, R)   V (R, K)   p, dp (M, R)
//     dU = (dh^T p) * s               dV = dp^T x
//
// x, W, h and their gradients are float32 or bfloat16, the factors, p and the factors' gradients float32. The products
// with W and the bias come first: by oneDNN where W is packed, else by ATen. Everything else is one pass over rows that
// adds to what they wrote. Forward it reads x and changes h, backward it reads dh and x and changes dx, each once, a
// tile of rows that stays in cache at a time. One layer is a group of one.
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

// of torch/csrc/inductor/aoti_torch/c/shim_cpu.h, which a module on the stable ABI cannot include; weak, because a
// torch that is built without oneDNN lacks them, and makes no packs
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle weight,
                                                                      AtenTensorHandle* bias, const char* attr,
                                                                      const double** scalars, int64_t scalars_len_,
                                                                      const char** algorithm, AtenTensorHandle* ret0);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__linear_pointwise_binary(AtenTensorHandle x, AtenTensorHandle other,
                                                                             AtenTensorHandle weight,
                                                                             AtenTensorHandle* bias, const char* attr,
                                                                             AtenTensorHandle* ret0);
}

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
    const ScalarType kind = x.scalar_type();
    return (kind == ScalarType::Float || kind == ScalarType::BFloat16) &&
           std::all_of(ss.begin(), ss.end(),
                       [](const Tensor& s) { return s.scalar_type() == ScalarType::Float && s.numel() <= kMaxRank; });
}

// -- operands -----------------------------------------------------------------------------------------------------

void check(bool fits) {
    STD_TORCH_CHECK(fits,
                    "siva_linear takes x, weight and bias in float32 or bfloat16, all alike, and factors in float32, "
                    "whose shapes fit together");
}

bool is_matrix(const Tensor& t, int64_t rows, int64_t columns, ScalarType kind = ScalarType::Float) {
    return t.scalar_type() == kind && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

bool is_vector(const Tensor& t, int64_t size, ScalarType kind = ScalarType::Float) {
    return t.scalar_type() == kind && t.dim() == 1 && t.size(0) == size;
}

// (*, columns) as (M, columns), each row without gaps.
class Matrix {
  public:
    explicit Matrix(const Tensor& t) : tensor_(t) {
        check(t.dim() > 0);
        columns_ = stride_ = t.size(t.dim() - 1);
        for (int64_t d = 0; d + 1 < t.dim(); ++d) rows_ *= t.size(d);
        if (t.is_contiguous()) return;
        if (t.dim() != 2) tensor_ = torch::stable::reshape(t, {rows_, columns_});
        if (tensor_.stride(1) != 1 || tensor_.stride(0) < columns_) tensor_ = torch::stable::contiguous(tensor_);
        stride_ = tensor_.stride(0);
    }

    Tensor tensor() const { return tensor_.dim() == 2 ? tensor_ : torch::stable::view(tensor_, {rows_, columns_}); }
    int64_t rows() const { return rows_; }
    int64_t columns() const { return columns_; }
    ScalarType kind() const { return tensor_.scalar_type(); }
    template <typename T>
    RowsOf<T> part(int64_t first, int64_t count) const {
        return {static_cast<T*>(tensor_.mutable_data_ptr()) + first * stride_, count, stride_};
    }

  private:
    Tensor tensor_;
    int64_t rows_ = 1, columns_ = 0, stride_ = 0;
};

// The shape of x or dh but for its last dimension.
Tensor new_rows(const Tensor& like, int64_t columns, std::optional<ScalarType> kind = std::nullopt) {
    std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
    sizes.back() = columns;
    return torch::stable::new_empty(like, sizes, kind);
}

// -- products with the weight -------------------------------------------------------------------------------------

bool is_packed(const Tensor& weight) {
    int32_t layout;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(weight.get(), &layout));
    return layout == aoti_torch_layout__mkldnn();
}

// x W^T + b for a packed W, plus `more` in the place of b
Tensor packed_product(const Tensor& x, const Tensor& packed, const Tensor* bias, const Tensor* more) {
    AtenTensorHandle found, of_bias = bias == nullptr ? nullptr : bias->get();
    AtenTensorHandle* const optional_bias = bias == nullptr ? nullptr : &of_bias;
    if (more == nullptr) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__linear_pointwise(x.get(), packed.get(), optional_bias, "none",
                                                                       nullptr, 0, nullptr, &found));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu__linear_pointwise_binary(x.get(), more->get(), packed.get(), optional_bias, "add", &found));
    }
    return Tensor(found);
}

// x W^T + b (*, N)
Tensor product(const Tensor& x, const Matrix& rows, const Tensor& weight, const std::optional<Tensor>& bias) {
    std::optional<Tensor> dense = bias;
    if (bias.has_value() && !bias->is_contiguous()) dense = torch::stable::contiguous(*bias);
    if (is_packed(weight)) return packed_product(x, weight, dense.has_value() ? &*dense : nullptr, nullptr);
    Tensor h = new_rows(x, weight.size(0));
    const Tensor target = Matrix(h).tensor(), factor = torch::stable::transpose(weight, 0, 1);
    if (dense.has_value()) {
        STABLE_TORCH_ERROR_CODE_CHECK(
            aoti_torch_cpu_addmm_out(target.get(), dense->get(), rows.tensor().get(), factor.get(), 1.0, 1.0));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(target.get(), rows.tensor().get(), factor.get()));
    }
    return h;
}

// The sum of all dh W (*, K); what is packed is W^T.
Tensor sum_of_products(const Tensors& dhs, const std::vector<Matrix>& rows, const Tensors& weights, int64_t k) {
    std::optional<Tensor> sum;
    for (size_t i = 0; i < weights.size(); ++i) {
        if (is_packed(weights[i])) {
            sum = packed_product(dhs[i], weights[i], nullptr, sum.has_value() ? &*sum : nullptr);
            continue;
        }
        const bool first = !sum.has_value();
        if (first) sum = new_rows(dhs[0], k);
        const Tensor target = Matrix(*sum).tensor(), dh = rows[i].tensor();
        AtenTensorHandle to = target.get();
        STABLE_TORCH_ERROR_CODE_CHECK(first ? aoti_torch_cpu_mm_out(to, dh.get(), weights[i].get())
                                            : aoti_torch_cpu_addmm_out(to, to, dh.get(), weights[i].get(), 1.0, 1.0));
    }
    return *sum;
}

// -- factors ------------------------------------------------------------------------------------------------------

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
    Packed(const Tensors& us, const Tensors& ss, const Tensors& vs, int64_t k) : ranks(ss), k_(k) {
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

template <typename T>
const LowRankOf<T>& low_rank();
template <>
const LowRankOf<float>& low_rank() {
    return choose_variant().low_rank.of_float;
}
template <>
const LowRankOf<BFloat16>& low_rank() {
    return choose_variant().low_rank.of_bfloat;
}

// The low-rank part is added to each of `targets`; p goes to where `p` says, without padding.
template <typename T>
void add_low_rank(const Matrix& rows, const Packed& packed, const std::vector<Matrix>& targets, float* p, int64_t p_row,
                  int64_t p_rank) {
    const Ranks& ranks = packed.ranks;
    const LowRankOf<T>& run = low_rank<T>();
    const auto tile = [&](int64_t first, int64_t count, Rows projected) {
        run.project(rows.part<T>(first, count), packed.v(), projected);
        for (size_t i = 0; i < targets.size(); ++i) {
            const Rows own = of_layer(projected, ranks, i);
            run.expand(own, packed.scaled_u(i), targets[i].part<T>(first, count));
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
}

// The outputs; p as above.
Tensors forward(const Tensor& x, const Tensors& weights, const Tensors& us, const Tensors& ss, const Tensors& vs,
                const Biases& biases, float* p, int64_t p_row, int64_t p_rank) {
    const Matrix rows(x);
    const Packed packed(us, ss, vs, rows.columns());
    check(weights.size() == us.size() && biases.size() == us.size());
    Tensors outputs;
    std::vector<Matrix> targets;
    for (size_t i = 0; i < weights.size(); ++i) {
        const int64_t n = us[i].size(0);
        check(is_matrix(weights[i], n, rows.columns(), rows.kind()) &&
              (!biases[i].has_value() || is_vector(*biases[i], n, rows.kind())));
        outputs.push_back(product(x, rows, weights[i], biases[i]));
        targets.emplace_back(outputs.back());
    }
    const auto add = rows.kind() == ScalarType::Float ? add_low_rank<float> : add_low_rank<BFloat16>;
    add(rows, packed, targets, p, p_row, p_rank);
    return outputs;
}

std::tuple<Tensor, Tensor> siva_linear(Tensor x, Tensor weight, Tensor u, Tensor s, Tensor v,
                                       std::optional<Tensor> bias) {
    if (!is_for_here(x, {s})) {
        const Tensors found = by_aten("fastpeft::siva_linear_aten", x, weight, u, s, v, bias);
        return {found[0], found[1]};
    }
    check(x.dim() > 0);
    Tensor p = new_rows(x, s.numel(), ScalarType::Float);
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
    Tensor p = torch::stable::new_empty(x, {sum, m}, ScalarType::Float);
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
template <typename T>
Gradients backward(const Tensors& dhs, const Tensor& x, const Tensors& weights, const Tensors& us, const Tensors& ss,
                   const Tensors& vs, View p, const Needs& needs) {
    check(dhs.size() == us.size() && weights.size() == us.size() && needs.du.size() == us.size() &&
          needs.dbias.size() == us.size());
    std::vector<Matrix> dh(dhs.begin(), dhs.end());
    const ScalarType kind = dh[0].kind();
    const int64_t m = dh[0].rows(), k = vs[0].dim() == 2 ? vs[0].size(1) : -1;
    const Packed packed(us, ss, vs, k);
    const Ranks& ranks = packed.ranks;
    const LowRankOf<T>& run = low_rank<T>();
    const int64_t chunk_rows = kTile * std::max<int64_t>(1, ceil_div(m, kTile * kMaxChunks));
    const int64_t chunks = ceil_div(m, chunk_rows);
    for (size_t i = 0; i < dh.size(); ++i) {
        const int64_t n = us[i].size(0);
        check(dh[i].kind() == kind && dh[i].rows() == m && dh[i].columns() == n);
        check(!needs.dx ||
              (is_packed(weights[i]) ? is_matrix(weights[i], k, n, kind) : is_matrix(weights[i], n, k, kind)));
    }

    const auto nothing = [&](ScalarType of) { return torch::stable::new_empty(dhs[0], {0}, of); };
    Gradients out{needs.dx ? sum_of_products(dhs, dh, weights, k) : nothing(kind), {}, nothing(ScalarType::Float), {}};
    if (needs.dv) out.dv = torch::stable::new_empty(dhs[0], {ranks.sum, k}, ScalarType::Float);
    std::optional<Matrix> rows, dx;
    if (needs.dv) rows.emplace(x);
    if (needs.dx) dx.emplace(out.dx);
    check(!needs.dv || (rows->kind() == kind && rows->rows() == m && rows->columns() == k));

    const Partial of_v(needs.dv, chunks, ranks.total, k);
    std::vector<Partial> of_u;
    for (size_t i = 0; i < dh.size(); ++i) {
        of_u.emplace_back(needs.du[i], chunks, ranks.padded_count(i), dh[i].columns());
        out.du.push_back(needs.du[i] ? torch::stable::new_empty(us[i], us[i].sizes()) : nothing(ScalarType::Float));
        out.dbias.push_back(needs.dbias[i] ? torch::stable::sum(dh[i].tensor(), std::vector<int64_t>{0})
                                           : nothing(kind));
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
                run.reduce(own, dh[i].part<T>(first, count), ranks.padded_count(i), dh[i].columns(), sums_u[i]);
            }
            if (!needs.dx && !needs.dv) return;
            for (size_t i = 0; i < dh.size(); ++i) {  // dp, in the place of p
                run.project(dh[i].part<T>(first, count), packed.scaled_u(i), of_layer(coefficients, ranks, i));
            }
            if (needs.dx) run.expand(coefficients, packed.v(), dx->part<T>(first, count));
            if (needs.dv) run.reduce(coefficients, rows->part<T>(first, count), ranks.total, k, sums_v);
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
    const auto run = dh.scalar_type() == ScalarType::Float ? backward<float> : backward<BFloat16>;
    Gradients found = run({dh}, x, {weight}, {u}, {s}, {v}, need_du ? by_columns(projected->tensor()) : View{},
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
    const auto run = dhs[0].scalar_type() == ScalarType::Float ? backward<float> : backward<BFloat16>;
    Gradients found =
        run(dhs, x, weights, us, ss, vs, any_du ? by_rows(p) : View{}, {need_dx, need_du, need_dv, need_dbias});
    return {found.dx, found.du, found.dv, found.dbias};
}

}  // namespace

// implementations only: the schemas are declared once, in fastpeft/ops; a call with a pack has a key of its own
#define FASTPEFT_IMPLEMENTATIONS(key)                                                 \
    STABLE_TORCH_LIBRARY_IMPL(fastpeft, key, m) {                                     \
        m.impl("siva_linear", TORCH_BOX(&siva_linear));                               \
        m.impl("siva_linear_backward", TORCH_BOX(&siva_linear_backward));             \
        m.impl("siva_linear_group", TORCH_BOX(&siva_linear_group));                   \
        m.impl("siva_linear_group_backward", TORCH_BOX(&siva_linear_group_backward)); \
    }

FASTPEFT_IMPLEMENTATIONS(CPU)
FASTPEFT_IMPLEMENTATIONS(MkldnnCPU)

}  // namespace fastpeft
