// Window attention of one sentence in float32, compiled once for each instruction set; the including file defines the
// macros that siva_linear_tile.h explains.
//
//     K = drop(C) + p        N keys, D wide       S^T = K Q^T     P^T = exp(S^T - lse)      Q, dO: R rows, D wide
//     O = P K                dP^T = K dO^T        dS^T = P^T (dP^T - delta)     delta = sum of dO O over D
//     dQ = dS K              dK = P^T dO + dS^T Q
//
// Scores stand with a key to a row and a query to a lane: maxima and sums over keys need no shuffles, and K is read in
// one layout by all products. The scores of a tile of queries and a block of keys are all that exists of them, so that
// they and the block stay in cache; forward goes from block to block with the largest score and the sum so far.
#include "window_attention_parts.h"

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace window_attention {
namespace {

constexpr int kRows = 4;
#if FASTPEFT_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kMostVectors = 6;  // 24 sums, 6 columns and an element: 31 of 32 registers
#else
constexpr int kMostVectors = 3;  // 12 sums, 3 columns and an element: all of 16 registers
#endif
constexpr int64_t kBlock = 96;  // keys

// A side of a product: element (i, k) at data[i * stride + k * step]
struct Left {
    const float* data;
    int64_t stride, step;
};

struct Right {  // element (k, j) at data[k * stride + j]
    const float* data;
    int64_t stride;
};

// The loops over sums are unrolled by a pragma: without it GCC keeps the sums in memory.
template <int kVectors>
FASTPEFT_TARGET inline void product_block(Left a, Right b, int64_t depth, bool add, float* c, int64_t stride) {
    Float sums[kRows][kVectors];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) sums[m][v] = add ? load(c + m * stride + v * kLanes) : Float{};
    }
    for (int64_t k = 0; k < depth; ++k) {
        Float right[kVectors];
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) right[v] = load(b.data + k * b.stride + v * kLanes);
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) {
            const Float left = broadcast(a.data[m * a.stride + k * a.step]);
#pragma GCC unroll 6
            for (int v = 0; v < kVectors; ++v) sums[m][v] = multiply_add(left, right[v], sums[m][v]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 6
        for (int v = 0; v < kVectors; ++v) store(sums[m][v], c + m * stride + v * kLanes);
    }
}

// `vectors` registers of columns, at most kVectors
template <int kVectors>
FASTPEFT_TARGET inline void product_panel(int64_t vectors, Left a, Right b, int64_t rows, int64_t depth, bool add,
                                          float* c, int64_t stride) {
    if constexpr (kVectors > 1) {
        if (vectors < kVectors) return product_panel<kVectors - 1>(vectors, a, b, rows, depth, add, c, stride);
    }
    for (int64_t m = 0; m < rows; m += kRows) {
        product_block<kVectors>({a.data + m * a.stride, a.stride, a.step}, b, depth, add, c + m * stride, stride);
    }
}

// c (rows, columns) = a b, or that added; rows are a multiple of kRows and columns of kLanes
FASTPEFT_TARGET void product(Left a, Right b, int64_t rows, int64_t columns, int64_t depth, bool add, float* c,
                             int64_t stride) {
    for (int64_t n = 0; n < columns;) {
        const int64_t left = (columns - n) / kLanes, panels = (left + kMostVectors - 1) / kMostVectors;
        const int64_t vectors = (left + panels - 1) / panels;
        product_panel<kMostVectors>(vectors, a, {b.data + n, b.stride}, rows, depth, add, c + n, stride);
        n += vectors * kLanes;
    }
}

// The keys of a sentence that are not hidden from all: those of the real slots, slot after slot, then one for each
// absent slot, then zeros up to a multiple of kRows.
struct Keys {
    float* rows;
    int32_t* tokens;  // of each key: kHidden, or kAbsent for one that stands for all tokens
    int64_t count, stride;
};

// Rows at multiples of 256 bytes would share few of the cache's sets.
int64_t stride_of(const Window& window) {
    const int64_t width = round_up(window.width, kLanes);
    return width % 64 == 0 ? width + 16 : width;
}

template <typename T>
FASTPEFT_TARGET inline void add_rows(const T* a, const float* b, int64_t count, float* to) {
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) store(load(a + d) + load(b + d), to + d);
    if (d < count) store(load(a + d, count - d) + load(b + d, count - d), to + d);
}

template <typename T>
FASTPEFT_TARGET void make_keys(const Window& window, const Sentence<T>& sentence, float* features, Keys& keys) {
    const int64_t tokens = window.tokens, width = window.width, stride = keys.stride;
    int64_t row = 0;
    for (int64_t s = 0; s < window.real; ++s) {
        if (window.drop != nullptr) read_features(window, sentence, s, features);
        const float* p = window.p + window.slots[s] * width;
        for (int64_t t = 0; t < tokens; ++t) {
            if (sentence.mask != nullptr && !sentence.mask[t]) continue;
            float* to = keys.rows + row * stride;
            if (window.drop != nullptr) {
                add_rows(features + t * width, p, width, to);
            } else {
                add_rows(sentence.c.row(s, t), p, width, to);
            }
            keys.tokens[row++] = t;
        }
    }
    for (int64_t a = 0; a < window.number - window.real; ++a) {
        read_row(window.p + window.absent[a] * width, width, keys.rows + row * stride);
        keys.tokens[row++] = kAbsent;
    }
    keys.count = round_up(row > 0 ? row : 1, kRows);
    for (; row < keys.count; ++row) {
        std::memset(keys.rows + row * stride, 0, stride * sizeof(float));
        keys.tokens[row] = kHidden;
    }
}

// The rows of a tile, zeros beyond the last, and the same with a row to a column
template <typename T>
FASTPEFT_TARGET void read_tile(const Window& window, TokenRows<T> x, int64_t first, int64_t tile, float* rows,
                               int64_t stride, float* columns, int64_t columns_stride) {
    for (int64_t r = 0; r < tile; ++r) {
        const int64_t row = first + r;
        float* to = rows + r * stride;
        if (row < window.heads * window.tokens) {
            read_row(x.row(row / window.tokens, row % window.tokens), window.width, to);
        } else {
            std::memset(to, 0, stride * sizeof(float));
        }
    }
    for (int64_t r = 0; r < tile; r += kRows) {
        for (int64_t d = 0; d < window.width; ++d) {
            for (int i = 0; i < kRows; ++i) columns[d * columns_stride + r + i] = rows[(r + i) * stride + d];
        }
    }
}

FASTPEFT_TARGET void count_scores(const int32_t* tokens, int64_t keys, bool causal, const Visible& seen, int64_t tile,
                                  float* scores, int64_t stride) {
    for (int64_t n = 0; n < keys; ++n) {
        if (tokens[n] >= 0 && !causal) continue;
        for (int64_t lane = 0; lane < tile; lane += kLanes) {
            float* at = scores + n * stride + lane;
            store(counted(load(at), tokens[n], causal, seen, lane), at);
        }
    }
}

int64_t tile_at(const Window& window, int64_t first) {
    const int64_t rows = round_up(window.heads * window.tokens - first, kLanes);
    return rows < kRowTile ? rows : kRowTile;
}

struct Memory {
    Memory(const Window& window, bool backward, Scratch& scratch) {
        const int64_t most = round_up(window.keys(), kRows), sides = backward ? 2 : 1;
        keys = {scratch.take<float>(most * stride_of(window)), scratch.take<int32_t>(most), 0, stride_of(window)};
        dkeys = scratch.take<float>(backward ? most * keys.stride : 0);
        features = scratch.take<float>(window.tokens * window.width);
        rows = scratch.take<float>(sides * kRowTile * keys.stride);
        columns = scratch.take<float>(window.width * sides * kRowTile);
        scores = scratch.take<float>(kBlock * sides * kRowTile);
        sums = scratch.take<float>(kRowTile * keys.stride);
    }

    Keys keys;
    float *dkeys, *features;
    float* rows;     // Q; backward dO, and Q below it
    float* columns;  // Q^T, and dO^T beside it
    float* scores;   // P^T, and dS^T beside it
    float* sums;     // of O or dQ
};

template <bool backward>
size_t bytes_of(const Window& window) {
    Scratch nowhere(nullptr);
    const Memory memory(window, backward, nowhere);
    return nowhere.end();
}

template <typename T>
FASTPEFT_TARGET void attend(const Window& window, const Sentence<T>& sentence, TokenRows<T> q, TokenRows<T> out,
                            float* lse, char* at) {
    Scratch scratch(at);
    Memory memory(window, false, scratch);
    Keys& keys = memory.keys;
    make_keys(window, sentence, memory.features, keys);
    const int64_t rows = window.heads * window.tokens, stride = keys.stride, width = round_up(window.width, kLanes);
    float largest[kRowTile], sum[kRowTile], factor[kRowTile];
    for (int64_t first = 0; first < rows; first += kRowTile) {
        const int64_t tile = tile_at(window, first);
        read_tile(window, q, first, tile, memory.rows, stride, memory.columns, tile);
        const Visible seen = visible(window, sentence.mask, first);
        for (int64_t r = 0; r < tile; ++r) {
            largest[r] = -kInfinite;
            sum[r] = 0;
            std::memset(memory.sums + r * stride, 0, width * sizeof(float));
        }
        for (int64_t block = 0; block < keys.count; block += kBlock) {
            const int64_t count = keys.count - block < kBlock ? keys.count - block : kBlock;
            const float* of_block = keys.rows + block * stride;
            float* scores = memory.scores;
            product({of_block, stride, 1}, {memory.columns, tile}, count, tile, window.width, false, scores, tile);
            count_scores(keys.tokens + block, count, window.causal, seen, tile, scores, tile);
            for (int64_t lane = 0; lane < tile; lane += kLanes) {
                const Float before = load(largest + lane);
                Float most = before;
                for (int64_t n = 0; n < count; n += kRows) {
                    const float* s = scores + n * tile + lane;
                    const Float of_two = larger(load(s), load(s + tile));
                    most = larger(most, larger(of_two, larger(load(s + 2 * tile), load(s + 3 * tile))));
                }
                store(most, largest + lane);
                const Float shift = most == -kInfinite ? Float{} : most;
                const Float kept = exponential(before - shift);
                store(kept, factor + lane);
                Float total = load(sum + lane) * kept;
                for (int64_t n = 0; n < count; n += kRows) {
                    Float weights[kRows];
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i) {
                        float* s = scores + (n + i) * tile + lane;
                        weights[i] = exponential(load(s) - shift);
                        store(weights[i], s);
                    }
                    total += (weights[0] + weights[1]) + (weights[2] + weights[3]);
                }
                store(total, sum + lane);
            }
            for (int64_t r = 0; r < tile && block > 0; ++r) {
                if (factor[r] == 1) continue;
                float* __restrict to = memory.sums + r * stride;
                for (int64_t d = 0; d < width; ++d) to[d] *= factor[r];
            }
            product({scores, 1, tile}, {of_block, stride}, tile, width, count, true, memory.sums, stride);
        }
        for (int64_t r = 0; r < tile && first + r < rows; ++r) {
            const int64_t row = first + r;
            float* __restrict of_row = memory.sums + r * stride;
            const float share = sum[r] == 0 ? 0 : 1 / sum[r];
            for (int64_t d = 0; d < width; ++d) of_row[d] *= share;
            write_row(of_row, window.width, out.row(row / window.tokens, row % window.tokens));
            lse[row] = largest[r] + __builtin_logf(sum[r]);
        }
    }
}

template <typename T>
FASTPEFT_TARGET void attend_backward(const Window& window, const Sentence<T>& sentence, TokenRows<T> dout,
                                     TokenRows<T> q, TokenRows<T> out, const float* lse, TokenRows<T> dq,
                                     TokenRows<T> dc, float* dp, char* at) {
    Scratch scratch(at);
    Memory memory(window, true, scratch);
    Keys& keys = memory.keys;
    make_keys(window, sentence, memory.features, keys);
    const int64_t rows = window.heads * window.tokens, stride = keys.stride, width = round_up(window.width, kLanes);
    float delta[kRowTile], shift[kRowTile];
    for (int64_t first = 0; first < rows; first += kRowTile) {
        const int64_t tile = tile_at(window, first), both = 2 * tile;
        read_tile(window, dout, first, tile, memory.rows, stride, memory.columns + tile, both);
        read_tile(window, q, first, tile, memory.rows + tile * stride, stride, memory.columns, both);
        const Visible seen = visible(window, sentence.mask, first);
        for (int64_t r = 0; r < tile; ++r) {
            const int64_t row = first + r;
            delta[r] = 0;
            shift[r] = kInfinite;  // all its weights are 0
            if (row >= rows) continue;
            const int64_t head = row / window.tokens, token = row % window.tokens;
            delta[r] = dot(dout.row(head, token), out.row(head, token), window.width);
            if (lse[row] != -kInfinite) shift[r] = lse[row];
        }
        for (int64_t block = 0; block < keys.count; block += kBlock) {
            const int64_t count = keys.count - block < kBlock ? keys.count - block : kBlock;
            const float* of_block = keys.rows + block * stride;
            float* scores = memory.scores;
            product({of_block, stride, 1}, {memory.columns, both}, count, both, window.width, false, scores, both);
            count_scores(keys.tokens + block, count, window.causal, seen, tile, scores, both);
            for (int64_t n = 0; n < count; ++n) {
                for (int64_t lane = 0; lane < tile; lane += kLanes) {
                    float* s = scores + n * both + lane;
                    const Float weights = exponential(load(s) - load(shift + lane));
                    store(weights, s);
                    store(weights * (load(s + tile) - load(delta + lane)), s + tile);
                }
            }
            product({scores, both, 1}, {memory.rows, stride}, count, width, both, first > 0,
                    memory.dkeys + block * stride, stride);
            if (dq.data == nullptr) continue;
            product({scores + tile, 1, both}, {of_block, stride}, tile, width, count, block > 0, memory.sums, stride);
        }
        for (int64_t r = 0; dq.data != nullptr && r < tile && first + r < rows; ++r) {
            const int64_t row = first + r;
            write_row(memory.sums + r * stride, window.width, dq.row(row / window.tokens, row % window.tokens));
        }
    }
    give(window, sentence, memory.dkeys, stride, memory.features, dc, dp);
}

template <typename T>
constexpr PassesOf<T> passes_of = {bytes_of<false>, bytes_of<true>, attend<T>, attend_backward<T>};

}  // namespace

constexpr Passes passes = {passes_of<float>, passes_of<BFloat16>};

}  // namespace window_attention
}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
