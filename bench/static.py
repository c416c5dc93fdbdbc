"""Compile every shipped tile of the Triton kernels offline and record what came out; it needs no GPU.

`python -m bench.static` writes `bench/data/static.csv`: one row per kernel, architecture and tile, with registers,
stack (where spilled registers go) and shared memory in bytes, and counts of matrix instructions. On NVIDIA they come
from the `cuobjdump` and `nvdisasm` that Triton carries, on AMD from the assembly. `source` is a hash of the kernel's
text, by which a test tells whether the file is current.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness import DATA, write_rows
from fastpeft.kernels import siva_linear
from fastpeft.kernels.tiles import SIVA_LINEAR_FWD

FILE = DATA / "static.csv"
TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {"siva_linear_fwd": siva_linear._siva_linear_fwd_kernel}
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
SPECIALISED = 16  # Triton compiles sizes, strides and addresses that are multiples of this apart: the usual case
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One thing to compile: a kernel for an architecture, with the types of its arguments and its constants."""

    kernel: str
    arch: str
    dtype: str  # Triton's name of the operands' type
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def key(self) -> dict[str, str]:
        """The columns that name it."""
        shown = {name: value for name, value in self.constants.items() if name.startswith(("BLOCK_", "PRECISION"))}
        shown |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        tile = " ".join(f"{name}={value}" for name, value in shown.items())
        return {"kernel": self.kernel, "arch": self.arch, "dtype": self.dtype, "tile": tile}


def siva_linear_fwd_variants(arch: str) -> Iterator[Variant]:
    """Tiles of the SiVA forward at its smallest and largest rank block; rows of x and of the weights contiguous."""
    contiguous = dict.fromkeys(("stride_xk", "stride_wk", "stride_ur", "stride_s", "stride_vk", "stride_bias"), 1)
    for dtype, kind in (("bf16", "half"), ("fp16", "half"), ("fp32", "tf32"), ("fp32", "ieee")):
        if arch == "sm_75" and kind != "ieee":
            continue  # the launcher leaves these to PyTorch there
        for tile in SIVA_LINEAR_FWD[kind]:
            for block_r in (16, siva_linear.MAX_RANK):
                constants = {
                    "HAS_BIAS": True,
                    "PRECISION": "tf32" if kind == "tf32" else "ieee",
                    "BLOCK_M": tile.block_m,
                    "BLOCK_N": tile.block_n,
                    "BLOCK_K": tile.block_k,
                    "BLOCK_R": block_r,
                    "GROUP_M": siva_linear.GROUP_M,
                }
                yield Variant("siva_linear_fwd", arch, dtype, constants | contiguous, tile.num_warps, tile.num_stages)


def variants() -> Iterator[Variant]:
    """Everything that `static.csv` has a row for."""
    for arch in TARGETS:
        yield from siva_linear_fwd_variants(arch)


def source_hash(kernel: str) -> str:
    """Identifies the kernel's text."""
    return hashlib.sha256(inspect.getsource(KERNELS[kernel].fn).encode()).hexdigest()[:12]


def compile_row(variant: Variant) -> dict[str, str]:
    """Compile `variant` and return its row."""
    kernel = KERNELS[variant.kernel]
    signature, attributes = {}, {}
    for position, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in variant.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{variant.dtype}" if name.endswith("_ptr") else "i32"
        if name not in ("M", "R", "stride_pm"):  # any number of rows and any rank; widths are multiples of 16
            attributes[(position,)] = [["tt.divisibility", SPECIALISED]]
    compiled = triton.compile(
        ASTSource(kernel, signature, variant.constants, attributes),
        target=TARGETS[variant.arch],
        options={"num_warps": variant.num_warps, "num_stages": variant.num_stages},
    )
    read = _read_amdgcn if variant.arch.startswith("gfx") else _read_cubin
    registers, stack, code = read(compiled.asm)
    return {
        **variant.key(),
        "registers": str(registers),
        "stack_bytes": str(stack),
        "shared_bytes": str(compiled.metadata.shared),
        **{name: str(len(re.findall(rf"\b{name}", code))) for name in MATRIX_INSTRUCTIONS},
        "triton": triton.__version__,
        "source": source_hash(variant.kernel),
    }


def _read_cubin(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Registers a thread, bytes of stack, and the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = _run("nvdisasm", "--print-code", cubin)
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1]), code


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Vector registers a thread, bytes of private memory, and the assembly."""
    code = asm["amdgcn"]
    stack = re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)[1]
    return int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1]), int(stack), code


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.static compiles kernels, and TRITON_INTERPRET=1 replaces the compiler; unset it.")
    write_rows(FILE, [compile_row(variant) for variant in variants()])


if __name__ == "__main__":
    main()
