// Window attention of one sentence by products of bfloat16 pairs (vdpbf16ps), accumulated in float32.
//
//     K = drop(C) + p        N keys, D wide       S^T = K Q^T     P^T = exp(S^T - lse)      Q, dO: R rows, D wide
//     O = P K                dP^T = K dO^T        dS^T = P^T (dP^T - delta)     delta = sum of dO O over D
//     dQ = dS K              dK = P^T dO + dS^T Q
//
// Scores stand with a key to a row and a query to a lane, so that maxima and sums over keys need no shuffles. K, Q, dO,
// P and dS are rounded to bfloat16 for the products; maxima, sums, exponentials and all results are float32.
//
// A product reads a pair of neighbours along the summed side as one 32-bit word. "Rows" below are (row, pair) words,
// and "pairs" are (pair, column) words: word [i][j] holds the elements (2 i, j) and (2 i + 1, j). Nothing of the
// standard library is called here: a copy of one of its functions, compiled for a newer processor, could end up in the
// code for all.
#if defined(__x86_64__)
#include "wide.h"
#define FASTPEFT_ISA avx512bf16
#define FASTPEFT_TARGET \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16" FASTPEFT_WHOLE_REGISTERS)))
#define FASTPEFT_VECTOR_BYTES 64
#include "variants.h"
#include "window_attention_parts.h"

namespace fastpeft {
namespace avx512bf16 {
namespace {

constexpr int kRows = 4, kMostVectors = 6;  // 24 sums, 6 columns and an element: 31 of 32 registers
constexpr int64_t kKeyBlock = 48;  // keys that backward works on at one time; numbers of keys are rounded up to these

FASTPEFT_TARGET inline __m512i words(__m512 low, __m512 high) {  // bfloat16 (low, high) in each 32-bit lane
    const __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}

FASTPEFT_TARGET inline void store_half(__m512 x, void* to) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

// What a product reads: word (row, pair) at data[row * row_stride + pair * pair_stride]
struct Left {
    const uint32_t* data;
    int64_t row_stride, pair_stride;
};

template <int kVectors>
FASTPEFT_TARGET inline void product_block(Left a, const uint32_t* b, int64_t columns, int64_t pairs, bool add,
                                          float* c) {
    __m512 sums[kRows][kVectors];
    for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kVectors; ++v) {
            sums[m][v] = add ? _mm512_loadu_ps(c + m * columns + v * kLanes) : _mm512_setzero_ps();
        }
    }
    for (int64_t k = 0; k < pairs; ++k) {
        __m512bh right[kVectors];
        for (int v = 0; v < kVectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + k * columns + v * kLanes);
        for (int m = 0; m < kRows; ++m) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(a.data[m * a.row_stride + k * a.pair_stride]);
            for (int v = 0; v < kVectors; ++v) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], left, right[v]);
        }
    }
    for (int m = 0; m < kRows; ++m) {
        for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(c + m * columns + v * kLanes, sums[m][v]);
    }
}

// `vectors` registers of columns, at most kVectors
template <int kVectors>
FASTPEFT_TARGET inline void product_panel(int64_t vectors, Left a, const uint32_t* b, int64_t rows, int64_t columns,
                                          int64_t pairs, bool add, float* c) {
    if constexpr (kVectors > 1) {
        if (vectors < kVectors) return product_panel<kVectors - 1>(vectors, a, b, rows, columns, pairs, add, c);
    }
    for (int64_t m = 0; m < rows; m += kRows) {
        const Left part = {a.data + m * a.row_stride, a.row_stride, a.pair_stride};
        product_block<kVectors>(part, b, columns, pairs, add, c + m * columns);
    }
}

// c (rows, columns) = a b, or that added; rows are a multiple of kRows and columns of kLanes
FASTPEFT_TARGET void product(Left a, const uint32_t* b, int64_t rows, int64_t columns, int64_t pairs, bool add,
                             float* c) {
    for (int64_t n = 0; n < columns;) {
        const int64_t left = (columns - n) / kLanes, vectors = left < kMostVectors ? left : kMostVectors;
        product_panel<kMostVectors>(vectors, a, b + n, rows, columns, pairs, add, c + n);
        n += vectors * kLanes;
    }
}

// The keys of a sentence that are not hidden from all, padded with zeros to `count` rows and `width` columns: those of
// the real slots, slot after slot, then one for each absent slot.
struct Keys {
    int64_t count, width;
    uint32_t *rows, *pairs;
    int32_t* tokens;  // of each key: kHidden, or kAbsent for one that stands for all tokens

    Left left(int64_t first) const { return {rows + first * (width / 2), width / 2, 1}; }
    const uint32_t* right(int64_t first) const { return pairs + first / 2 * width; }
};

FASTPEFT_TARGET Keys make_keys(const Window& window, const Sentence<BFloat16>& sentence, Scratch& scratch) {
    const int64_t tokens = window.tokens, width = window.width;
    Keys keys = {round_up(window.keys(), kKeyBlock), round_up(width, kLanes), nullptr, nullptr, nullptr};
    keys.rows = scratch.take<uint32_t>(keys.count * keys.width / 2);
    keys.pairs = scratch.take<uint32_t>(keys.count * keys.width / 2);
    keys.tokens = scratch.take<int32_t>(keys.count);
    float* features = scratch.take<float>(tokens * width);
    float* both = scratch.take<float>(2 * keys.width);  // two rows
    std::memset(both, 0, 2 * keys.width * sizeof(float));
    int64_t row = 0;
    const auto next = [&](int32_t token) { return keys.tokens[row] = token, both + row % 2 * keys.width; };
    const auto put = [&]() FASTPEFT_TARGET {
        const float* from = both + row % 2 * keys.width;
        for (int64_t d = 0; d < keys.width; d += kLanes) {
            store_half(_mm512_loadu_ps(from + d), keys.rows + (row * keys.width + d) / 2);
        }
        if (row % 2 == 1) {
            for (int64_t d = 0; d < keys.width; d += kLanes) {
                const __m512i packed = words(_mm512_loadu_ps(both + d), _mm512_loadu_ps(both + keys.width + d));
                _mm512_storeu_si512(keys.pairs + row / 2 * keys.width + d, packed);
            }
        }
        ++row;
    };
    for (int64_t s = 0; s < window.real; ++s) {
        read_features(window, sentence, s, features);
        const float* p = window.p + window.slots[s] * width;
        for (int64_t t = 0; t < tokens; ++t) {
            if (sentence.mask != nullptr && !sentence.mask[t]) continue;
            float* __restrict to = next(t);
            const float* __restrict feature = features + t * width;
            for (int64_t d = 0; d < width; ++d) to[d] = feature[d] + p[d];
            put();
        }
    }
    for (int64_t a = 0; a < window.number - window.real; ++a) {
        std::memcpy(next(kAbsent), window.p + window.absent[a] * width, width * sizeof(float));
        put();
    }
    for (keys.count = round_up(row > 0 ? row : 1, kKeyBlock); row < keys.count;) {
        std::memset(next(kHidden), 0, width * sizeof(float));
        put();
    }
    return keys;
}

// Rows of queries, and of what has their shape, in both layouts; those beyond the last query are zeros.
FASTPEFT_TARGET void pack_rows(const Window& window, TokenRows<BFloat16> x, int64_t first, int64_t rows, int64_t width,
                               uint32_t* transposed, uint32_t* pairs) {
    for (int64_t r = 0; r < rows; r += 2) {
        for (int64_t d = 0; d < width; d += kLanes) {
            __m256i both[2];
            for (int i = 0; i < 2; ++i) {
                const int64_t row = first + r + i, left = window.width - d;
                const bool there = row < window.heads * window.tokens;
                const __mmask16 kept = !there ? 0 : left < kLanes ? (1u << left) - 1 : 0xFFFFu;
                const BFloat16* from = there ? x.row(row / window.tokens, row % window.tokens) + d : nullptr;
                both[i] = _mm256_maskz_loadu_epi16(kept, from);
                uint32_t half[kLanes / 2];
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(half), both[i]);
                for (int e = 0; e < kLanes / 2; ++e) transposed[(d / 2 + e) * rows + r + i] = half[e];
            }
            if (pairs != nullptr) {
                const __m512i low = _mm512_cvtepu16_epi32(both[0]), high = _mm512_cvtepu16_epi32(both[1]);
                _mm512_storeu_si512(pairs + r / 2 * width + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        }
    }
}

int64_t tile_of(const Window& window) {
    const int64_t rows = round_up(window.heads * window.tokens, kLanes);
    return rows < kRowTile ? rows : kRowTile;
}

size_t forward_scratch(const Window& window) {
    const int64_t keys = round_up(window.keys(), kKeyBlock), width = round_up(window.width, 16);
    return 4 * (keys * width + keys + window.tokens * window.width + 2 * width + kRowTile * width +
                3 * keys * kRowTile / 2 + kRowTile * width / 2) +
           64 * 32;
}

size_t backward_scratch(const Window& window) {
    const int64_t keys = round_up(window.keys(), kKeyBlock), width = round_up(window.width, 16);
    return 4 * (2 * keys * width + keys + 2 * window.tokens * window.width + 2 * width + 3 * kRowTile * width +
                4 * kKeyBlock * kRowTile) +
           64 * 32;
}

FASTPEFT_TARGET void attend(const Window& window, const Sentence<BFloat16>& sentence, TokenRows<BFloat16> q,
                            TokenRows<BFloat16> out, float* lse, char* memory) {
    Scratch scratch(memory);
    const Keys keys = make_keys(window, sentence, scratch);
    const int64_t rows = window.heads * window.tokens, tile = tile_of(window), width = keys.width;
    uint32_t* queries = scratch.take<uint32_t>(width / 2 * tile);
    float* scores = scratch.take<float>(keys.count * tile);
    uint32_t* weights = scratch.take<uint32_t>(keys.count / 2 * tile);
    float* result = scratch.take<float>(tile * width);
    float largest[kRowTile], sum[kRowTile];
    for (int64_t first = 0; first < rows; first += tile) {
        pack_rows(window, q, first, tile, width, queries, nullptr);
        product(keys.left(0), queries, keys.count, tile, width / 2, false, scores);
        const Visible seen = visible(window, sentence.mask, first);
        for (int64_t lane = 0; lane < tile; lane += kLanes) {
            __m512 most = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
            for (int64_t n = 0; n < keys.count; ++n) {
                float* at = scores + n * tile + lane;
                const __m512 score = (__m512)counted(load(at), keys.tokens[n], window.causal, seen, lane);
                _mm512_storeu_ps(at, score);
                most = _mm512_max_ps(most, score);
            }
            _mm512_storeu_ps(largest + lane, most);
            const __mmask16 none = _mm512_cmp_ps_mask(most, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
            most = _mm512_mask_mov_ps(most, none, _mm512_setzero_ps());
            for (int64_t n = 0; n < keys.count; n += 2) {
                const float* at = scores + n * tile + lane;
                const __m512 low = (__m512)exponential(load(at) - (Float)most);
                const __m512 high = (__m512)exponential(load(at + tile) - (Float)most);
                total = _mm512_add_ps(total, _mm512_add_ps(low, high));
                _mm512_storeu_si512(weights + n / 2 * tile + lane, words(low, high));
            }
            _mm512_storeu_ps(sum + lane, total);
        }
        product({weights, 1, tile}, keys.right(0), tile, width, keys.count / 2, false, result);
        for (int64_t r = 0; r < tile && first + r < rows; ++r) {
            const int64_t row = first + r;
            const float share = sum[r] == 0 ? 0 : 1 / sum[r];  // NaN stays
            for (int64_t d = 0; d < window.width; ++d) result[r * width + d] *= share;
            write_row(result + r * width, window.width, out.row(row / window.tokens, row % window.tokens));
            lse[row] = largest[r] + __builtin_logf(sum[r]);
        }
    }
}

FASTPEFT_TARGET void attend_backward(const Window& window, const Sentence<BFloat16>& sentence, TokenRows<BFloat16> dout,
                                     TokenRows<BFloat16> q, TokenRows<BFloat16> out, const float* lse,
                                     TokenRows<BFloat16> dq, TokenRows<BFloat16> dc, float* dp, char* memory) {
    Scratch scratch(memory);
    const Keys keys = make_keys(window, sentence, scratch);
    const int64_t rows = window.heads * window.tokens, tile = tile_of(window), width = keys.width;
    uint32_t* queries = scratch.take<uint32_t>(width / 2 * tile);
    uint32_t* query_pairs = scratch.take<uint32_t>(tile / 2 * width);
    uint32_t* douts = scratch.take<uint32_t>(width / 2 * tile);
    uint32_t* dout_pairs = scratch.take<uint32_t>(tile / 2 * width);
    float* scores = scratch.take<float>(kKeyBlock * tile);
    float* dscores = scratch.take<float>(kKeyBlock * tile);
    uint32_t* weight_rows = scratch.take<uint32_t>(kKeyBlock * tile / 2);
    uint32_t* dscore_rows = scratch.take<uint32_t>(kKeyBlock * tile / 2);
    uint32_t* dscore_pairs = scratch.take<uint32_t>(kKeyBlock / 2 * tile);
    float* dkeys = scratch.take<float>(keys.count * width);
    float* dqueries = scratch.take<float>(tile * width);
    float* features = scratch.take<float>(window.tokens * window.width);
    float delta[kRowTile], shift[kRowTile];
    for (int64_t first = 0; first < rows; first += tile) {
        pack_rows(window, q, first, tile, width, queries, query_pairs);
        pack_rows(window, dout, first, tile, width, douts, dout_pairs);
        const Visible seen = visible(window, sentence.mask, first);
        for (int64_t r = 0; r < tile; ++r) {
            const int64_t row = first + r;
            delta[r] = 0;
            shift[r] = __builtin_inff();  // all its weights are 0
            if (row >= rows) continue;
            const int64_t head = row / window.tokens, token = row % window.tokens;
            delta[r] = dot(dout.row(head, token), out.row(head, token), window.width);
            if (lse[row] != -__builtin_inff()) shift[r] = lse[row];
        }
        for (int64_t block = 0; block < keys.count; block += kKeyBlock) {
            product(keys.left(block), queries, kKeyBlock, tile, width / 2, false, scores);
            product(keys.left(block), douts, kKeyBlock, tile, width / 2, false, dscores);
            for (int64_t lane = 0; lane < tile; lane += kLanes) {
                const __m512 of_query = _mm512_loadu_ps(shift + lane), mean = _mm512_loadu_ps(delta + lane);
                for (int64_t n = 0; n < kKeyBlock; n += 2) {
                    __m512 change[2];
                    for (int i = 0; i < 2; ++i) {
                        const int64_t at = (n + i) * tile + lane;
                        const int32_t token = keys.tokens[block + n + i];
                        const Float score = counted(load(scores + at), token, window.causal, seen, lane);
                        const __m512 weight = (__m512)exponential(score - (Float)of_query);
                        change[i] = _mm512_mul_ps(weight, _mm512_sub_ps(_mm512_loadu_ps(dscores + at), mean));
                        store_half(weight, weight_rows + at / 2);
                        store_half(change[i], dscore_rows + at / 2);
                    }
                    _mm512_storeu_si512(dscore_pairs + n / 2 * tile + lane, words(change[0], change[1]));
                }
            }
            float* sums = dkeys + block * width;
            product({weight_rows, tile / 2, 1}, dout_pairs, kKeyBlock, width, tile / 2, first > 0, sums);
            product({dscore_rows, tile / 2, 1}, query_pairs, kKeyBlock, width, tile / 2, true, sums);
            product({dscore_pairs, 1, tile}, keys.right(block), tile, width, kKeyBlock / 2, block > 0, dqueries);
        }
        for (int64_t r = 0; dq.data != nullptr && r < tile && first + r < rows; ++r) {
            const int64_t row = first + r;
            write_row(dqueries + r * width, window.width, dq.row(row / window.tokens, row % window.tokens));
        }
    }
    give(window, sentence, dkeys, width, features, dc, dp);
}

}  // namespace

const PassesOf<BFloat16> passes = {forward_scratch, backward_scratch, attend, attend_backward};

}  // namespace avx512bf16
}  // namespace fastpeft
#endif
