// What mezo_perturb does on a card.
//
// The tensors' pointers and places in the noise are the kernel's argument, which lives in constant memory and which a
// CUDA graph keeps. A thread owns the four elements of one counter of the noise ("quad"), so every word is drawn once
// (Rademacher: by the 32 threads that share it), and computes with the same functions as the CPU, so the bits are the
// same. Compile with --fmad=false.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "normal.h"
#include "storage.h"

namespace fastpeft {
namespace {

constexpr int kThreads = 256, kQuadsPerThread = 4;
constexpr uint32_t kTileQuads = kThreads * kQuadsPerThread;  // a block takes a tile of one tensor at a time
constexpr int kMaxParts = 880, kMaxTerms = 16;

struct Launch {
    // of each tensor
    const void* source[kMaxParts];
    void* target[kMaxParts];
    uint64_t offset[kMaxParts];  // flat index of its first element
    uint64_t numel[kMaxParts];
    uint32_t end_tile[kMaxParts];  // tiles of this and all tensors before it
    int num_parts;
    // terms, by value or, where the pointers are not null, in the card's memory
    int num_terms;
    uint64_t seed_values[kMaxTerms];
    double scale_values[kMaxTerms];
    const uint64_t* seeds;
    const double* scales;
    double keep;  // 1 - decay, for the first term
    bool stochastic;
};
static_assert(sizeof(Launch) <= 32764, "more than the arguments of a kernel may take");

template <typename T>
struct Quad {
    T element[4];
};

// What a thread moves at once: 8 bytes of half precision, 16 of others.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
template <typename T>
constexpr int kWide = sizeof(Quad<T>) / sizeof(Wide<T>);

template <typename T>
__device__ bool is_aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(Wide<T>) == 0;
}

template <typename T>
__device__ Quad<T> read_quad(const T* p) {
    Wide<T> words[kWide<T>];
    for (int i = 0; i < kWide<T>; ++i) words[i] = reinterpret_cast<const Wide<T>*>(p)[i];
    Quad<T> quad;
    std::memcpy(&quad, words, sizeof quad);
    return quad;
}

// By the intrinsic for what is not read again soon: a plain assignment is split into four by the assembler of
// CUDA 13.0.
template <typename T>
__device__ void write_quad(T* p, const Quad<T>& quad) {
    Wide<T> words[kWide<T>];
    std::memcpy(words, &quad, sizeof quad);
    for (int i = 0; i < kWide<T>; ++i) __stcs(reinterpret_cast<Wide<T>*>(p) + i, words[i]);
}

template <bool is_rademacher>
__device__ Lanes draw(uint64_t q, uint64_t seed) {
    if constexpr (!is_rademacher) return box_muller(random_words(q, seed, kNoise));
    const Words words = random_words(q / 32, seed, kNoise);
    const uint32_t lower = q & 8 ? words.w[1] : words.w[0], upper = q & 8 ? words.w[3] : words.w[2];
    const uint32_t bits = (q & 16 ? upper : lower) >> (4 * (q % 8));
    return {{sign(bits), sign(bits >> 1), sign(bits >> 2), sign(bits >> 3)}};
}

// All terms on the four elements of counter q.
template <typename T, bool is_rademacher>
__device__ void apply_terms(Quad<T>& quad, uint64_t q, const Launch& launch) {
    for (int i = 0; i < launch.num_terms; ++i) {
        const uint64_t seed = launch.seeds ? launch.seeds[i] : launch.seed_values[i];
        const auto scale = static_cast<compute_t<T>>(launch.scales ? launch.scales[i] : launch.scale_values[i]);
        const auto keep = static_cast<compute_t<T>>(i == 0 ? launch.keep : 1.0);
        const Lanes lanes = draw<is_rademacher>(q, seed);
        const bool stochastic = sizeof(T) == 2 && launch.stochastic;
        const Words words = stochastic ? random_words(q, seed, kRounding) : Words{};
        for (int lane = 0; lane < 4; ++lane) {
            compute_t<T> value = load(quad.element[lane]) * keep + static_cast<compute_t<T>>(lanes.z[lane]) * scale;
            if (stochastic) value = round_stochastic<T>(value, words.w[lane]);
            quad.element[lane] = store<T>(value);
        }
    }
}

template <typename T, bool is_rademacher>
__global__ void __launch_bounds__(kThreads) perturb(const __grid_constant__ Launch launch) {
    for (uint32_t tile = blockIdx.x; tile < launch.end_tile[launch.num_parts - 1]; tile += gridDim.x) {
        // 1. The tensor of this tile.
        int part = 0;
        for (int after = launch.num_parts - 1; part < after;) {
            const int middle = (part + after) / 2;
            if (tile < launch.end_tile[middle]) {
                after = middle;
            } else {
                part = middle + 1;
            }
        }
        const T* source = static_cast<const T*>(launch.source[part]);
        T* target = static_cast<T*>(launch.target[part]);
        const uint64_t offset = launch.offset[part];
        const int64_t numel = launch.numel[part];
        const uint32_t begin_tile = part == 0 ? 0 : launch.end_tile[part - 1];
        const uint64_t first_q = offset / 4 + uint64_t{tile - begin_tile} * kTileQuads + threadIdx.x;

        // 2. Its quads: at once where they lie whole and aligned, else element by element.
        for (int i = 0; i < kQuadsPerThread; ++i) {
            const uint64_t q = first_q + i * kThreads;
            const int64_t index = static_cast<int64_t>(4 * q - offset);  // of the quad's first element
            if (index >= numel) break;
            const bool whole = index >= 0 && index + 4 <= numel;
            Quad<T> quad;
            if (whole && is_aligned(source + index) && is_aligned(target + index)) {
                quad = read_quad(source + index);
                apply_terms<T, is_rademacher>(quad, q, launch);
                write_quad(target + index, quad);
                continue;
            }
            for (int lane = 0; lane < 4; ++lane) {
                const int64_t e = index + lane;
                quad.element[lane] = e >= 0 && e < numel ? source[e] : T{};
            }
            apply_terms<T, is_rademacher>(quad, q, launch);
            for (int lane = 0; lane < 4; ++lane) {
                const int64_t e = index + lane;
                if (e >= 0 && e < numel) target[e] = quad.element[lane];
            }
        }
    }
}

}  // namespace
}  // namespace fastpeft
