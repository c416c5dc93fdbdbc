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
#include <immintrin.h>

#include <cstring>

#include "window_attention.h"

#if defined(__clang__)
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16")))
#else
#define FASTPEFT_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512bf16,prefer-vector-width=512")))
#endif

namespace fastpeft {
namespace avx512bf16 {
namespace {

constexpr int kLanes = 16, kRows = 4, kMostVectors = 6;  // 24 sums, 6 columns and an element: 31 of 32 registers

FASTPEFT_TARGET inline __m512i words(__m512 low, __m512 high) {  // bfloat16 (low, high) in each 32-bit lane
    const __m512i l = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(low));
    const __m512i h = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(high));
    return _mm512_or_si512(l, _mm512_slli_epi32(h, 16));
}

FASTPEFT_TARGET inline void store_half(__m512 x, void* to) {
    _mm256_storeu_si256(static_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
}

FASTPEFT_TARGET inline __m512 widened(const BFloat16* from, __mmask16 there) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from)), 16));
}

FASTPEFT_TARGET inline void store_row(const float* from, int64_t count, BFloat16* to) {
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) store_half(_mm512_loadu_ps(from + d), to + d);
    for (; d < count; ++d) to[d] = store<BFloat16>(from[d]);
}

FASTPEFT_TARGET inline __m512 exponential(__m512 x) {  // 0 from 2^-149 down, -infinity included
    x = _mm512_max_ps(x, _mm512_set1_ps(-200.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0x08);
    __m512 t = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    t = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), t);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    const float terms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float term : terms) y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(term));
    y = _mm512_fmadd_ps(y, _mm512_mul_ps(t, t), _mm512_add_ps(t, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(y, n);
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

// c (rows, columns) = a b, or that added; rows are a multiple of kRows and columns of kLanes
FASTPEFT_TARGET void product(Left a, const uint32_t* b, int64_t rows, int64_t columns, int64_t pairs, bool add,
                             float* c) {
    for (int64_t n = 0; n < columns;) {
        const int64_t left = (columns - n) / kLanes, vectors = left < kMostVectors ? left : kMostVectors;
        for (int64_t m = 0; m < rows; m += kRows) {
            const Left part = {a.data + m * a.row_stride, a.row_stride, a.pair_stride};
            float* to = c + m * columns + n;
            switch (vectors) {
                case 1:
                    product_block<1>(part, b + n, columns, pairs, add, to);
                    break;
                case 2:
                    product_block<2>(part, b + n, columns, pairs, add, to);
                    break;
                case 3:
                    product_block<3>(part, b + n, columns, pairs, add, to);
                    break;
                case 4:
                    product_block<4>(part, b + n, columns, pairs, add, to);
                    break;
                case 5:
                    product_block<5>(part, b + n, columns, pairs, add, to);
                    break;
                default:
                    product_block<6>(part, b + n, columns, pairs, add, to);
            }
        }
        n += vectors * kLanes;
    }
}

constexpr int32_t kHidden = -1, kAbsent = -2;

class Scratch {
  public:
    explicit Scratch(char* at) : at_(at) {}

    template <typename T>
    T* take(int64_t count) {
        T* found = reinterpret_cast<T*>(at_);
        at_ += round_up(count * sizeof(T), 64);
        return found;
    }

  private:
    char* at_;
};

// The keys of a sentence, padded with zeros to `count` rows and `width` columns: those of the real slots, slot after
// slot, then one for each absent slot.
struct Keys {
    int64_t count, width;
    uint32_t *rows, *pairs;
    int32_t* tokens;  // of each key: kHidden, or kAbsent for one that stands for all tokens

    Left left(int64_t first) const { return {rows + first * (width / 2), width / 2, 1}; }
    const uint32_t* right(int64_t first) const { return pairs + first / 2 * width; }
};

FASTPEFT_TARGET Keys make_keys(const Window& window, const Sentence& sentence, Scratch& scratch) {
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
        for (int64_t t = 0; t < tokens; ++t) {
            const BFloat16* __restrict from = sentence.c.row(s, t);
            for (int64_t d = 0; d < width; ++d) features[t * width + d] = load(from[d]);
        }
        if (window.drop != nullptr) {
            const uint32_t ordinal = window.ordinal + static_cast<uint32_t>(window.slots[s]);
            window.drop(features, Format::kFloat32, sentence.index * tokens * width, tokens * width,
                        {window.seed, ordinal, window.threshold, window.scale});
        }
        const float* p = window.p + window.slots[s] * width;
        for (int64_t t = 0; t < tokens; ++t) {
            float* __restrict to = next(sentence.mask == nullptr || sentence.mask[t] ? t : kHidden);
            const float* __restrict feature = features + t * width;
            for (int64_t d = 0; d < width; ++d) to[d] = feature[d] + p[d];
            put();
        }
    }
    for (int64_t a = 0; a < window.number - window.real; ++a) {
        std::memcpy(next(kAbsent), window.p + window.absent[a] * width, width * sizeof(float));
        put();
    }
    while (row < keys.count) {
        std::memset(next(kHidden), 0, width * sizeof(float));
        put();
    }
    return keys;
}

// Rows of queries, and of what has their shape, in both layouts; those beyond the last query are zeros.
FASTPEFT_TARGET void pack_rows(const Window& window, Matrix x, int64_t first, int64_t rows, int64_t width,
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

// What the scores of a tile of queries depend on beside the products.
struct Visible {
    int32_t token[kRowTile];    // of the query
    float of_absent[kRowTile];  // log of the number of tokens that it sees
};

FASTPEFT_TARGET Visible visible(const Window& window, const Sentence& sentence, int64_t first) {
    Visible found;
    for (int64_t r = 0; r < kRowTile; ++r) {
        const int64_t token = (first + r) % window.tokens;
        found.token[r] = token;
        int64_t number = window.causal ? token + 1 : window.tokens;
        if (sentence.mask != nullptr) {
            const int64_t last = number;
            number = 0;
            for (int64_t t = 0; t < last; ++t) number += sentence.mask[t];
        }
        found.of_absent[r] = number > 0 ? __builtin_logf(static_cast<float>(number)) : -__builtin_inff();
    }
    return found;
}

// The score of a key of `token` as it counts: -infinity where it is hidden
FASTPEFT_TARGET inline __m512 counted(__m512 score, int32_t token, bool causal, const Visible& seen, int64_t lane) {
    const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
    if (token == kHidden) return nothing;
    if (token == kAbsent) return _mm512_add_ps(score, _mm512_loadu_ps(seen.of_absent + lane));
    if (!causal) return score;
    const __mmask16 before = _mm512_cmplt_epi32_mask(_mm512_loadu_si512(seen.token + lane), _mm512_set1_epi32(token));
    return _mm512_mask_mov_ps(score, before, nothing);
}

int64_t tile_of(const Window& window) {
    const int64_t rows = round_up(window.heads * window.tokens, kLanes);
    return rows < kRowTile ? rows : kRowTile;
}

}  // namespace

FASTPEFT_TARGET void attend(const Window& window, const Sentence& sentence, Matrix q, Matrix out, float* lse,
                            char* memory) {
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
        const Visible seen = visible(window, sentence, first);
        for (int64_t lane = 0; lane < tile; lane += kLanes) {
            __m512 most = _mm512_set1_ps(-__builtin_inff()), total = _mm512_setzero_ps();
            for (int64_t n = 0; n < keys.count; ++n) {
                float* at = scores + n * tile + lane;
                const __m512 score = counted(_mm512_loadu_ps(at), keys.tokens[n], window.causal, seen, lane);
                _mm512_storeu_ps(at, score);
                most = _mm512_max_ps(most, score);
            }
            _mm512_storeu_ps(largest + lane, most);
            const __mmask16 none = _mm512_cmp_ps_mask(most, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ);
            most = _mm512_mask_mov_ps(most, none, _mm512_setzero_ps());
            for (int64_t n = 0; n < keys.count; n += 2) {
                const float* at = scores + n * tile + lane;
                const __m512 low = exponential(_mm512_sub_ps(_mm512_loadu_ps(at), most));
                const __m512 high = exponential(_mm512_sub_ps(_mm512_loadu_ps(at + tile), most));
                total = _mm512_add_ps(total, _mm512_add_ps(low, high));
                _mm512_storeu_si512(weights + n / 2 * tile + lane, words(low, high));
            }
            _mm512_storeu_ps(sum + lane, total);
        }
        product({weights, 1, tile}, keys.right(0), tile, width, keys.count / 2, false, result);
        for (int64_t r = 0; r < tile && first + r < rows; ++r) {
            const int64_t row = first + r;
            const float share = sum[r] > 0 ? 1.0f / sum[r] : 0.0f;
            for (int64_t d = 0; d < window.width; ++d) result[r * width + d] *= share;
            store_row(result + r * width, window.width, out.row(row / window.tokens, row % window.tokens));
            lse[row] = largest[r] + __builtin_logf(sum[r]);
        }
    }
}

FASTPEFT_TARGET void attend_backward(const Window& window, const Sentence& sentence, Matrix dout, Matrix q, Matrix out,
                                     const float* lse, Matrix dq, Matrix dc, float* dp, char* memory) {
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
        const Visible seen = visible(window, sentence, first);
        for (int64_t r = 0; r < tile; ++r) {
            const int64_t row = first + r;
            delta[r] = 0;
            shift[r] = __builtin_inff();  // all its weights are 0
            if (row >= rows) continue;
            const BFloat16* a = dout.row(row / window.tokens, row % window.tokens);
            const BFloat16* b = out.row(row / window.tokens, row % window.tokens);
            __m512 sums = _mm512_setzero_ps();
            for (int64_t d = 0; d < window.width; d += kLanes) {
                const int64_t left = window.width - d;
                const __mmask16 there = left < kLanes ? (1u << left) - 1 : 0xFFFFu;
                sums = _mm512_fmadd_ps(widened(a + d, there), widened(b + d, there), sums);
            }
            delta[r] = _mm512_reduce_add_ps(sums);
            if (lse[row] > -__builtin_inff()) shift[r] = lse[row];
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
                        const __m512 score = counted(_mm512_loadu_ps(scores + at), token, window.causal, seen, lane);
                        const __m512 weight = exponential(_mm512_sub_ps(score, of_query));
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
            store_row(dqueries + r * width, window.width, dq.row(row / window.tokens, row % window.tokens));
        }
    }
    const float* from = dkeys;
    for (int64_t s = 0; s < window.real; ++s) {
        float* sums = dp + window.slots[s] * window.width;
        for (int64_t d = 0; d < window.width; ++d) sums[d] = 0;
        for (int64_t t = 0; t < window.tokens; ++t, from += width) {
            float* to = features + t * window.width;
            for (int64_t d = 0; d < window.width; ++d) sums[d] += to[d] = from[d];
        }
        if (dc.data == nullptr) continue;
        if (window.drop != nullptr) {
            const uint32_t ordinal = window.ordinal + static_cast<uint32_t>(window.slots[s]);
            const int64_t count = window.tokens * window.width;
            window.drop(features, Format::kFloat32, sentence.index * count, count,
                        {window.seed, ordinal, window.threshold, window.scale});
        }
        for (int64_t t = 0; t < window.tokens; ++t) {
            store_row(features + t * window.width, window.width, dc.row(s, t));
        }
    }
    for (int64_t a = 0; a < window.number - window.real; ++a, from += width) {
        std::memcpy(dp + window.absent[a] * window.width, from, window.width * sizeof(float));
    }
}

}  // namespace avx512bf16
}  // namespace fastpeft
#endif
