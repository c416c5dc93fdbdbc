// The products of a SiVA layer in variants.h, compiled once for each instruction set: the including file defines
//
//     FASTPEFT_ISA            the namespace that this copy lives in
//     FASTPEFT_TARGET         the attribute that makes the compiler use the instruction set ("" for its default)
//     FASTPEFT_VECTOR_BYTES   the width of its registers
//     FASTPEFT_BFLOAT16       if there is an instruction that rounds to bfloat16; then for rows of that dtype alone
//
// Each product keeps a block of sums in registers while it runs along the long side once: x and out are read or written
// once for all ranks of a block. Nothing of the standard library is called here: a copy of one of its functions,
// compiled for a newer processor, could end up in the code for all.
#include "variants.h"
#include "vectors.h"

// sums and addresses of rows stay in registers only where the loop that has them is not a call
#define FASTPEFT_INLINED __attribute__((always_inline)) FASTPEFT_TARGET inline

namespace fastpeft {
namespace FASTPEFT_ISA {
namespace siva_linear {
namespace {

// AVX-512 has 32 registers, the others 16 (NEON's 32 are half as wide as AVX2's): blocks are as large as they allow
constexpr int kRows = FASTPEFT_VECTOR_BYTES == 64 ? 4 : 2;     // rows that share what is loaded of factors
constexpr int kVectors = FASTPEFT_VECTOR_BYTES == 64 ? 4 : 2;  // registers side by side along the columns

// Adds the products of `count` columns from k on of kRankBlock ranks with those of the rows.
template <int kCount, typename T>
FASTPEFT_INLINED void project_columns(T* const (&x)[kCount], int64_t k, const float* factors, int64_t columns,
                                      int count, Float (&sums)[kCount][kRankBlock]) {
    Float factor[kRankBlock];
    for (int r = 0; r < kRankBlock; ++r) factor[r] = load(factors + r * columns + k, count);
    for (int m = 0; m < kCount; ++m) {
        const Float value = load(x[m] + k, count);
        for (int r = 0; r < kRankBlock; ++r) sums[m][r] = multiply_add(value, factor[r], sums[m][r]);
    }
}

// kCount rows from `first` on
template <int kCount, typename T>
FASTPEFT_TARGET inline void project_rows(RowsOf<T> rows, int64_t first, Factors factors, Rows coefficients) {
    T* x[kCount];
    for (int m = 0; m < kCount; ++m) x[m] = rows.row(first + m);
    for (int64_t r = 0; r < factors.ranks; r += kRankBlock) {
        const float* block = factors.data + r * factors.columns;
        Float sums[kCount][kRankBlock] = {};
        int64_t k = 0;
        for (; k + kLanes <= factors.columns; k += kLanes) {
            project_columns(x, k, block, factors.columns, kLanes, sums);
        }
        if (k < factors.columns) project_columns(x, k, block, factors.columns, factors.columns - k, sums);
        for (int m = 0; m < kCount; ++m) {
            float* out = coefficients.data + (first + m) * coefficients.stride + r;
            for (int i = 0; i < kRankBlock; ++i) out[i] = sum_of_lanes(sums[m][i]);
        }
    }
}

template <typename T>
FASTPEFT_TARGET void project(RowsOf<T> x, Factors factors, Rows coefficients) {
    int64_t m = 0;
    for (; m + kRows <= x.count; m += kRows) project_rows<kRows>(x, m, factors, coefficients);
    for (; m < x.count; ++m) project_rows<1>(x, m, factors, coefficients);
}

// kWidth registers side by side of each row from column n on, the last of them `count` lanes
template <int kCount, int kWidth, typename T>
FASTPEFT_INLINED void expand_columns(const float* coefficients, int64_t stride, Factors factors, int64_t n, int count,
                                     T* const (&out)[kCount]) {
    Float sums[kCount][kWidth] = {};
    for (int64_t r = 0; r < factors.ranks; ++r) {
        const float* row = factors.data + r * factors.columns + n;
        Float factor[kWidth];
        for (int i = 0; i < kWidth; ++i) factor[i] = load(row + i * kLanes, count);
        for (int m = 0; m < kCount; ++m) {
            const Float coefficient = broadcast(coefficients[m * stride + r]);
            for (int i = 0; i < kWidth; ++i) sums[m][i] = multiply_add(coefficient, factor[i], sums[m][i]);
        }
    }
    for (int m = 0; m < kCount; ++m) {
        for (int i = 0; i < kWidth; ++i) {
            T* to = out[m] + n + i * kLanes;
            store(load(to, count) + sums[m][i], to, count);
        }
    }
}

// kCount rows from `first` on
template <int kCount, typename T>
FASTPEFT_TARGET inline void expand_rows(Rows coefficients, int64_t first, Factors factors, RowsOf<T> rows) {
    const float* own = coefficients.data + first * coefficients.stride;
    T* out[kCount];
    for (int m = 0; m < kCount; ++m) out[m] = rows.row(first + m);
    int64_t n = 0;
    for (; n + kVectors * kLanes <= factors.columns; n += kVectors * kLanes) {
        expand_columns<kCount, kVectors>(own, coefficients.stride, factors, n, kLanes, out);
    }
    while (n < factors.columns) {
        const int count = factors.columns - n < kLanes ? factors.columns - n : kLanes;
        expand_columns<kCount, 1>(own, coefficients.stride, factors, n, count, out);
        n += count;
    }
}

template <typename T>
FASTPEFT_TARGET void expand(Rows coefficients, Factors factors, RowsOf<T> out) {
    int64_t m = 0;
    for (; m + kRows <= out.count; m += kRows) expand_rows<kRows>(coefficients, m, factors, out);
    for (; m < out.count; ++m) expand_rows<1>(coefficients, m, factors, out);
}

// The sums of kWidth registers side by side from column k on, the last of them `count` lanes, for kRankBlock ranks
template <int kWidth, typename T>
FASTPEFT_INLINED void reduce_columns(Rows coefficients, RowsOf<T> x, int64_t k, int64_t columns, int count,
                                     float* out) {
    Float sums[kRankBlock][kWidth] = {};
    for (int64_t m = 0; m < x.count; ++m) {
        const T* row = x.row(m) + k;
        Float value[kWidth];
        for (int i = 0; i < kWidth; ++i) value[i] = load(row + i * kLanes, count);
        for (int r = 0; r < kRankBlock; ++r) {
            const Float coefficient = broadcast(coefficients.data[m * coefficients.stride + r]);
            for (int i = 0; i < kWidth; ++i) sums[r][i] = multiply_add(coefficient, value[i], sums[r][i]);
        }
    }
    for (int r = 0; r < kRankBlock; ++r) {
        for (int i = 0; i < kWidth; ++i) {
            float* sum = out + r * columns + k + i * kLanes;
            store(load(sum, count) + sums[r][i], sum, count);
        }
    }
}

template <typename T>
FASTPEFT_TARGET void reduce(Rows coefficients, RowsOf<T> x, int64_t ranks, int64_t columns, float* sums) {
    int64_t k = 0;
    while (k < columns) {
        const bool wide = k + kVectors * kLanes <= columns;
        const int count = columns - k < kLanes ? columns - k : kLanes;
        for (int64_t r = 0; r < ranks; r += kRankBlock) {
            const Rows block = {coefficients.data + r, coefficients.stride};
            if (wide) {
                reduce_columns<kVectors>(block, x, k, columns, kLanes, sums + r * columns);
            } else {
                reduce_columns<1>(block, x, k, columns, count, sums + r * columns);
            }
        }
        k += wide ? kVectors * kLanes : count;
    }
}

}  // namespace

#if !defined(FASTPEFT_BFLOAT16)
constexpr LowRank low_rank = {{project, expand, reduce}, {project, expand, reduce}};
#endif

}  // namespace siva_linear

#if defined(FASTPEFT_BFLOAT16)
const LowRankOf<BFloat16> low_rank = {siva_linear::project, siva_linear::expand, siva_linear::reduce};
#endif

}  // namespace FASTPEFT_ISA
}  // namespace fastpeft
