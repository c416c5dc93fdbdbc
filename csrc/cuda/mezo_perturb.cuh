// What mezo_perturb does on a GPU.
//
// The tensors' pointers and places in the noise are the kernel's argument, which lives in constant memory and which a
// CUDA graph keeps. A thread owns the eight elements of one counter of the noise ("octet"), so every word is drawn once
// (Rademacher: by the 16 threads that share it), and computes with the same functions as the CPU, so the bits are the
// same. Compile with --fmad=false.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "normal.h"
#include "storage.h"
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#endif

namespace fastpeft {
namespace {

constexpr int kThreads = 256, kOctetsPerThread = 2;
constexpr uint32_t kTileOctets = kThreads * kOctetsPerThread;  // a block takes a tile of one tensor at a time
constexpr int kMaxParts = 880, kMaxTerms = 16;

struct Launch {
    // of each tensor
    const void* source[kMaxParts];
    void* target[kMaxParts];
    uint64_t offset[kMaxParts];  // flat index of its first element
    uint64_t numel[kMaxParts];
    uint32_t end_tile[kMaxParts];  // tiles of this and all tensors before it
    int num_parts;
    int num_terms;
    uint64_t seeds[kMaxTerms];
    double scales[kMaxTerms];
    double keep;  // 1 - decay, for the first term
    bool stochastic;
};
static_assert(sizeof(Launch) <= 32764, "more than the arguments of a kernel may take");

// Eight elements of a tensor as they lie in memory; a thread moves 16 bytes at once.
template <typename T>
struct Octet {
    static constexpr int kWide = kGaussians * sizeof(T) / sizeof(uint4);

    uint4 words[kWide];
};

template <typename T>
__device__ bool is_aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(uint4) == 0;
}

template <typename T>
__device__ Octet<T> read_octet(const T* p) {
    Octet<T> octet;
    for (int i = 0; i < octet.kWide; ++i) octet.words[i] = reinterpret_cast<const uint4*>(p)[i];
    return octet;
}

// By the intrinsic for what is not read again soon: a plain assignment is split into four by the assembler of
// CUDA 13.0.
template <typename T>
__device__ void write_octet(T* p, const Octet<T>& octet) {
    for (int i = 0; i < octet.kWide; ++i) __stcs(reinterpret_cast<uint4*>(p) + i, octet.words[i]);
}

// The two elements of a half precision in a word; to nearest by one instruction, whatever NaN it makes of one.
template <typename T>
__device__ uint32_t store_two(float first, float second) {
#if defined(__CUDA_ARCH__)
    uint32_t word;
    if constexpr (std::is_same_v<T, BFloat16>) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(first, second);
        std::memcpy(&word, &two, sizeof word);
    } else {
        const __half2 two = __floats2half2_rn(first, second);
        std::memcpy(&word, &two, sizeof word);
    }
    return word;
#else
    return store<T>(first).bits | static_cast<uint32_t>(store<T>(second).bits) << 16;
#endif
}

template <typename T>
__device__ void widen(const Octet<T>& octet, compute_t<T> (&value)[kGaussians]) {
    if constexpr (sizeof(T) == 2) {
        uint32_t two[kGaussians / 2];
        std::memcpy(two, &octet, sizeof two);
        for (int i = 0; i < kGaussians; ++i)
            value[i] = load(T{static_cast<uint16_t>(i % 2 ? two[i / 2] >> 16 : two[i / 2] & 0xFFFFu)});
    } else {
        std::memcpy(value, &octet, sizeof octet);
    }
}

template <typename T>
__device__ void narrow(const compute_t<T> (&value)[kGaussians], Octet<T>& octet) {
    if constexpr (sizeof(T) == 2) {
        uint32_t two[kGaussians / 2];
        for (int i = 0; i < kGaussians; i += 2) two[i / 2] = store_two<T>(value[i], value[i + 1]);
        std::memcpy(&octet, two, sizeof two);
    } else {
        std::memcpy(&octet, value, sizeof octet);
    }
}

template <bool is_rademacher>
__device__ Lanes draw(uint64_t q, uint64_t seed) {
    if constexpr (!is_rademacher) return gaussian(random_words(q, seed, kNoise));
    const Words words = random_words(q / 16, seed, kNoise);
    const uint32_t lower = q & 4 ? words.w[1] : words.w[0], upper = q & 4 ? words.w[3] : words.w[2];
    const uint32_t bits = (q & 8 ? upper : lower) >> (8 * (q % 4));
    Lanes lanes;
    for (int lane = 0; lane < kGaussians; ++lane) lanes.z[lane] = sign(bits >> lane);
    return lanes;
}

// All terms on the eight elements of counter q.
template <typename T, bool is_rademacher>
__device__ void apply_terms(Octet<T>& octet, uint64_t q, const Launch& launch) {
    for (int i = 0; i < launch.num_terms; ++i) {
        const uint64_t seed = launch.seeds[i];
        const auto scale = static_cast<compute_t<T>>(launch.scales[i]);
        const auto keep = static_cast<compute_t<T>>(i == 0 ? launch.keep : 1.0);
        const Lanes lanes = draw<is_rademacher>(q, seed);
        compute_t<T> value[kGaussians];
        widen(octet, value);
        for (int lane = 0; lane < kGaussians; ++lane)
            value[lane] = value[lane] * keep + static_cast<compute_t<T>>(lanes.z[lane]) * scale;
        if (sizeof(T) == 2 && launch.stochastic) {
            for (int half = 0; half < 2; ++half) {
                const Words words = random_words(2 * q + half, seed, kRounding);
                for (int k = 0; k < 4; ++k) value[4 * half + k] = round_stochastic<T>(value[4 * half + k], words.w[k]);
            }
        }
        narrow<T>(value, octet);
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
        const uint64_t first_q = offset / kGaussians + uint64_t{tile - begin_tile} * kTileOctets + threadIdx.x;

        // 2. Its octets: moved at once where they lie whole and aligned, else element by element.
        for (int i = 0; i < kOctetsPerThread; ++i) {
            const uint64_t q = first_q + i * kThreads;
            const int64_t index = static_cast<int64_t>(kGaussians * q - offset);  // of the octet's first element
            if (index >= numel) break;
            const bool at_once =
                index >= 0 && index + kGaussians <= numel && is_aligned(source + index) && is_aligned(target + index);
            const auto is_inside = [&](int lane) { return index + lane >= 0 && index + lane < numel; };
            Octet<T> octet;
            if (at_once) {
                octet = read_octet(source + index);
            } else {
                T element[kGaussians];
                for (int lane = 0; lane < kGaussians; ++lane)
                    element[lane] = is_inside(lane) ? source[index + lane] : T{};
                std::memcpy(&octet, element, sizeof octet);
            }
            apply_terms<T, is_rademacher>(octet, q, launch);
            if (at_once) {
                write_octet(target + index, octet);
            } else {
                T element[kGaussians];
                std::memcpy(element, &octet, sizeof octet);
                for (int lane = 0; lane < kGaussians; ++lane)
                    if (is_inside(lane)) target[index + lane] = element[lane];
            }
        }
    }
}

}  // namespace
}  // namespace fastpeft
