"""mezo_perturb_ in CUDA: its kernel on the processor, one thread after the other, and on a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bits import DTYPES, assert_same_bits, bits, values

from fastpeft import functional
from fastpeft.ops import noise, reference

HARNESS = """
#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
struct alignas(16) uint4 { unsigned x, y, z, w; };
template <typename Word> void __stcs(Word* p, Word word) { *p = word; }
struct { unsigned x; } threadIdx, blockIdx, gridDim;
#include "cuda/mezo_perturb.cuh"
using namespace fastpeft;

template <typename T>
void run_as(const Launch& launch, bool rademacher) {
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x)
            rademacher ? perturb<T, true>(launch) : perturb<T, false>(launch);
}

extern "C" void run(int parts, void** params, const uint64_t* offsets, const uint64_t* numels, int format, int terms,
                    const uint64_t* seeds, const double* scales, double keep, int rademacher,
                    int stochastic) {
    Launch launch = {};
    for (launch.num_parts = 0; launch.num_parts < parts; ++launch.num_parts) {
        const int i = launch.num_parts;
        launch.source[i] = launch.target[i] = params[i];
        launch.offset[i] = offsets[i];
        launch.numel[i] = numels[i];
        const uint64_t octets = (offsets[i] + numels[i] + 7) / 8 - offsets[i] / 8;
        launch.end_tile[i] = (i ? launch.end_tile[i - 1] : 0) + (octets + kTileOctets - 1) / kTileOctets;
    }
    launch.num_terms = terms;
    launch.keep = keep;
    launch.stochastic = stochastic;
    for (int i = 0; i < terms; ++i) {
        launch.seeds[i] = seeds[i];
        launch.scales[i] = scales[i];
    }
    gridDim.x = 3;
    switch (static_cast<Format>(format)) {
        case Format::kFloat32: return run_as<float>(launch, rademacher);
        case Format::kFloat64: return run_as<double>(launch, rademacher);
        case Format::kBFloat16: return run_as<BFloat16>(launch, rademacher);
        case Format::kFloat16: return run_as<Float16>(launch, rademacher);
    }
}
"""


@pytest.fixture(scope="module")
def kernel_on_the_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernel, its threads run one after the other by a C++ compiler."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "harness.cpp").write_text(HARNESS)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{Path(__file__).parents[2] / 'csrc'}"]
    subprocess.run(["c++", *flags, str(folder / "harness.cpp"), "-o", str(folder / "harness.so")], check=True)
    return ctypes.CDLL(str(folder / "harness.so"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", noise.NOISE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cuda_kernel_has_the_bits_of_the_reference(
    kernel_on_the_host: ctypes.CDLL, dtype: torch.dtype, kind: str, rounding: str
) -> None:
    """On tensors of less and more than a tile whose elements lie on and off the boundaries of a wide load."""
    room = [values(n + 8, dtype, seed=n) for n in (1, 5, 3000, 9001, 64, 4096)]
    offsets = [0, 1, 2**32 - 1000, 10_000, 19_003, 2**40]
    starts = [0, 3, 0, 0, 3, 1]
    numels = [storage.numel() - 8 for storage in room]
    ours = [storage[start : start + n] for storage, start, n in zip(room, starts, numels)]
    around = [bits(storage) for storage in room]
    expected = [param.clone() for param in ours]
    seeds, scales = [7, 2**62 + 1], [1e-3, -2e-5]
    reference.mezo_perturb_(expected, offsets, seeds, scales, 0.3, kind, rounding)

    def array(kind: type, values: Sequence) -> ctypes.Array:
        return (kind * len(values))(*values)

    kernel_on_the_host.run(
        len(ours),
        array(ctypes.c_void_p, [param.data_ptr() for param in ours]),
        array(ctypes.c_uint64, offsets),
        array(ctypes.c_uint64, numels),
        DTYPES.index(dtype),
        len(seeds),
        array(ctypes.c_uint64, seeds),
        array(ctypes.c_double, scales),
        ctypes.c_double(1 - 0.3),
        kind == "rademacher",
        rounding == "stochastic",
    )
    for storage, before, start, param, theirs in zip(room, around, starts, ours, expected):
        assert_same_bits(param, theirs)
        assert torch.equal(bits(storage)[:start], before[:start])
        assert torch.equal(bits(storage)[start + param.numel() :], before[start + param.numel() :])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("kind", noise.NOISE)
def test_a_gpu_perturbs_to_the_same_bits(kind: str, rounding: str) -> None:
    dtypes = [dtype for dtype in DTYPES for _ in range(1000)]  # more tensors of a dtype than one launch takes
    sizes = [1 + 37 * i % 900 for i in range(len(dtypes))]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    ours = [values(n, dtype, seed=n) for n, dtype in zip(sizes, dtypes)]
    on_gpu = [param.cuda() for param in ours]
    args = (offsets, [1] * 20, [1e-3] * 20, 0.1, kind, rounding)  # more terms than one launch takes
    functional.mezo_perturb_(ours, *args)
    functional.mezo_perturb_(on_gpu, *args)
    for one, other in zip(ours, on_gpu):
        assert_same_bits(one, other.cpu())
