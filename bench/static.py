"""Compile every shipped tile of the Triton kernels offline and record what came out; it needs no GPU.

`python -m bench.static` writes `bench/data/static.csv`, and with names of kernels only their rows anew: one row per
kernel, architecture and tile, with registers, stack (where spilled registers go) and shared memory in bytes, and counts
of matrix instructions. On NVIDIA they come from the `cuobjdump` and `nvdisasm` that Triton carries, on AMD from the
assembly. `source` is a hash of the kernel's text, by which a test tells whether the file is current.

Where `fastpeft._C_cuda` was built, `bench/data/static_cuda.csv` gets the same of its kernels, with counts of
instructions: all, loads and stores of 16 bytes a thread, and fused multiply-adds, of which there should be none. For
the Gaussian pass `per_element` is what a thread executes for an element: the fewest instructions from one load of whole
and aligned elements, by the noise of one term, rounding to nearest and the store, to the next load.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.harness import DATA, read_rows, write_rows
from fastpeft.kernels import frozen_head_cross_entropy as frozen_head
from fastpeft.kernels import mezo_perturb as mezo
from fastpeft.kernels import (
    siva_linear,
    siva_linear_backward,
    siva_linear_mixed,
    siva_linear_sums,
    tiles,
    window_attention,
    window_attention_backward,
)

ROOT = Path(__file__).parent.parent
FILE, CUDA_FILE = DATA / "static.csv", DATA / "static_cuda.csv"
TARGETS = {
    **{f"sm_{number}": GPUTarget("cuda", number, 32) for number in (75, 80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    "siva_linear_fwd": siva_linear._siva_linear_fwd_kernel.fn,
    "siva_linear_bwd_dx": siva_linear_backward._siva_linear_bwd_dx_kernel.fn,
    "siva_linear_bwd_partials": siva_linear_sums._siva_linear_bwd_partials_kernel,
    "siva_linear_bwd_sum": siva_linear_sums._siva_linear_bwd_sum_kernel,
    "siva_linear_group_fwd": siva_linear._siva_linear_fwd_kernel.fn,
    "siva_linear_group_bwd_dx": siva_linear_backward._siva_linear_bwd_dx_kernel.fn,
    "siva_linear_mixed_fwd": siva_linear_mixed._siva_linear_mixed_kernel,
    "siva_linear_mixed_bwd_dx": siva_linear_mixed._siva_linear_mixed_kernel,
    "siva_linear_mixed_bwd_partials": siva_linear_mixed._siva_linear_mixed_bwd_partials_kernel,
    "mezo_perturb": mezo._mezo_perturb_kernel,
    "window_attention_fwd": window_attention._window_attention_fwd_kernel,
    "window_attention_combine": window_attention._window_attention_combine_kernel,
    "window_attention_bwd_bases": window_attention_backward._window_attention_bwd_bases_kernel,
    "window_attention_bwd_queries": window_attention_backward._window_attention_bwd_queries_kernel,
    "window_attention_bwd_keys": window_attention_backward._window_attention_bwd_keys_kernel,
    "frozen_head_softmax": frozen_head._softmax_kernel,
}
WINDOW_ATTENTION_TYPES = {
    **dict.fromkeys(("lse_ptr", "base_ptr", "delta_ptr", "dp_ptr"), "*fp32"),
    **{"mask_ptr": "*i32", "seed_ptr": "*i64", "scale": "fp32"},
    **dict.fromkeys(("slots", "ordinal", "last_dropped"), "i64"),
}
ROW_TYPES = {"order_ptr": "*i64", "table_ptr": "*i64"}
# what stands beside operands in half precision: factors but for the one of the inner loop, p, q, and gradients
_FWD, _DX = (dict.fromkeys((factor, "s_ptrs"), "*fp32") for factor in ("u_ptrs", "v_ptrs"))
_SUMS = dict.fromkeys(("narrow_ptrs", "s_ptrs", "s_ptr", "p_ptr", "q_ptr", "partial_ptr", "du_ptr", "dv_ptr"), "*fp32")
_MIXED = {**ROW_TYPES, **dict.fromkeys(("u_ptr", "s_ptr", "p_ptr"), "*fp32")}
ARGUMENT_TYPES = {  # of what is neither a pointer to operands in the row's dtype nor a 32-bit integer
    **{key: {**_FWD, "p_ptr": "*fp32"} for key in ("siva_linear_fwd", "siva_linear_group_fwd")},
    **{key: {**_DX, "q_ptr": "*fp32"} for key in ("siva_linear_bwd_dx", "siva_linear_group_bwd_dx")},
    **dict.fromkeys(("siva_linear_bwd_partials", "siva_linear_bwd_sum"), _SUMS),
    **dict.fromkeys(("siva_linear_mixed_fwd", "siva_linear_mixed_bwd_dx"), _MIXED),
    "siva_linear_mixed_bwd_partials": {**ROW_TYPES, **_SUMS},
    "mezo_perturb": {
        **{"table_ptr": "*i64", "tensor_ptr": "*i32", "seeds_ptr": "*i64", "scales_ptr": "*fp64", "keep_bits": "i64"}
    },
    "window_attention_fwd": WINDOW_ATTENTION_TYPES,
    "window_attention_combine": dict.fromkeys(("parts_ptr", "part_lse_ptr", "lse_ptr"), "*fp32"),
    "window_attention_bwd_bases": WINDOW_ATTENTION_TYPES,
    "window_attention_bwd_queries": WINDOW_ATTENTION_TYPES,
    "window_attention_bwd_keys": WINDOW_ATTENTION_TYPES,
    "frozen_head_softmax": {"labels_ptr": "*i64", "losses_ptr": "*fp32"},
}
_SHOWN = ("BLOCK_", "P", "IS_", "NEED_G", "CAUSAL", "DROPOUT")  # constants of a tile begin with one of these
KEY = ("kernel", "arch", "dtype", "tile")  # the columns that name a row
MATRIX_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "v_mfma")
SPECIALISED = 16  # Triton compiles sizes, strides and addresses that are multiples of this apart: the usual case
ANY = (  # but not counts, rows of R and what does not specialise
    *("M", "R", "splits", "stride_un", "stride_vk", "num_terms", "keep_bits"),
    *("size", "size_u", "ranks", "strides_nr", "strides_pc", "strides_pr", "blocks_m", "tokens"),
    *("rows", "T", "S", "parts", "slots", "absent", "seed_ptr", "ordinal", "last_dropped", "scale"),
)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Variant:
    """One thing to compile: a kernel for an architecture, with the types of its arguments and its constants."""

    kernel: str
    arch: str
    dtype: str  # Triton's name of the operands' type
    constants: dict[str, Any]  # of a tuple, None stands for what is none
    num_warps: int
    num_stages: int

    def key(self) -> dict[str, str]:
        """The columns that name it."""
        shown = {name: value for name, value in self.constants.items() if name.startswith(_SHOWN)}
        shown |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        tile = " ".join(f"{name}={value}" for name, value in shown.items())
        return {"kernel": self.kernel, "arch": self.arch, "dtype": self.dtype, "tile": tile}


RANK_BLOCKS = (16, tiles.MAX_RANK)  # the smallest and the largest
SHARED_ARCHS = tuple(arch for arch in TARGETS if arch not in ("sm_86", "sm_89", "sm_120"))  # which run what sm_80 runs
SIVA_LINEAR_ARCHS = tuple(arch for arch in TARGETS if arch != "sm_75")  # where the launcher leaves all to PyTorch
MULTIPROCESSORS = 304  # of an MI300X; on other GPUs nothing that is compiled depends on it


def siva_linear_constants(layers: int) -> dict[str, dict[str, Any]]:
    """The products of so many layers, whose operands are contiguous: strides of 1."""
    many, ones = (None,) * layers, (1,) * layers
    fwd = {
        **dict.fromkeys(("w_ptrs", "u_ptrs", "s_ptrs", "v_ptrs", "bias_ptrs", "h_ptrs"), many),
        **dict.fromkeys(("columns", "ranks", "biases", "strides_wn"), many),
        **{"strides_wk": ones, "stride_xk": 1},
    }
    dx = {
        **dict.fromkeys(("dh_ptrs", "w_ptrs", "u_ptrs", "s_ptrs", "v_ptrs"), many),
        **dict.fromkeys(("columns", "ranks", "strides_dhm", "strides_wn"), many),
        **dict.fromkeys(("strides_dhn", "strides_wk"), ones),
    }
    name = "siva_linear" if layers == 1 else "siva_linear_group"
    return {f"{name}_fwd": fwd, f"{name}_bwd_dx": dx}


SIVA_LINEAR_MIXED = {
    "siva_linear_mixed_fwd": {
        **dict.fromkeys(("stride_xk", "stride_wk", "stride_ur", "stride_vk"), 1),
        **dict.fromkeys(("HAS_BIAS", "HAS_ORDER"), True),
    },
    "siva_linear_mixed_bwd_dx": {
        **dict.fromkeys(("stride_xk", "stride_wn", "stride_un", "stride_vr"), 1),
        **{"HAS_BIAS": False, "HAS_ORDER": True},
    },
}
SIVA_LINEAR_SUMS = {
    "siva_linear_bwd_partials": {  # of one dU and of dV
        **dict.fromkeys(("wide_ptrs", "narrow_ptrs", "s_ptrs", "columns", "ranks", "strides_wm"), (None, None)),
        **dict.fromkeys(("strides_wc", "strides_nm", "strides_s"), (1, 1)),
        **{"strides_nr": (None, None), "strides_pc": (None, 1), "strides_pr": (1, None)},
    },
    "siva_linear_mixed_bwd_partials": {**dict.fromkeys(("stride_dhn", "stride_xk"), 1), "HAS_ORDER": True},
}


def siva_linear_variants(arch: str) -> Iterator[Variant]:
    """SiVA's kernels: the products of one layer, of three, and of mixed rows; the sums of rows.

    Of operands of 16 bits bfloat16 stands for both.
    """
    if arch not in SIVA_LINEAR_ARCHS:
        return
    for tile, rank in itertools.product(tiles.siva_linear(arch, 1), RANK_BLOCKS):
        kernels: dict[str, Any] = siva_linear_constants(1) if tile in tiles.siva_linear(arch, rank) else {}
        if arch in SHARED_ARCHS and tile in tiles.siva_linear(arch, rank, layers=3):
            kernels |= siva_linear_constants(3) | SIVA_LINEAR_MIXED
        for kernel, constants in kernels.items():
            yield siva_linear_variant(kernel, arch, tile, rank, constants)
    if arch not in SHARED_ARCHS:
        return
    sums = tiles.SIVA_LINEAR_SUMS
    for (kernel, constants), block_r in itertools.product(SIVA_LINEAR_SUMS.items(), RANK_BLOCKS):
        shape = {"BLOCK_M": sums.block_m, "BLOCK_C": sums.block_c, "BLOCK_R": block_r, **constants}
        yield Variant(kernel, arch, "bf16", shape, sums.num_warps, sums.num_stages)
    yield Variant("siva_linear_bwd_sum", arch, "bf16", {"BLOCK_E": tiles.SUM_BLOCK}, tiles.SUM_WARPS, num_stages=1)


def siva_linear_variant(kernel: str, arch: str, tile: tiles.Tile, rank: int, constants: dict[str, Any]) -> Variant:
    """One of them with what it is launched with, beside the constants of its operands."""
    of_gpu = {"XCDS": tiles.Gpu(arch, MULTIPROCESSORS).dies, "GROUP_M": tiles.GROUP_M, "BLOCK_R": rank}
    return Variant(kernel, arch, "bf16", {**tile.constants(), **of_gpu, **constants}, tile.num_warps, tile.num_stages)


MEZO_DTYPES = {"fp32": tl.float32, "fp64": tl.float64, "i16": tl.int16, "fp16": tl.float16}  # bfloat16 goes as its bits


def mezo_perturb_variants(arch: str) -> Iterator[Variant]:
    """Both kinds of noise in every dtype; half precision rounds stochastically, which takes the most registers."""
    for dtype in MEZO_DTYPES:
        for is_rademacher in (False, True):
            constants = {
                "dtype": MEZO_DTYPES[dtype],
                "IS_RADEMACHER": is_rademacher,
                "IS_STOCHASTIC": dtype in ("i16", "fp16"),
                "BLOCK_Q": tiles.MEZO_PERTURB.block_q,
            }
            yield Variant("mezo_perturb", arch, dtype, constants, tiles.MEZO_PERTURB.num_warps, num_stages=3)


WINDOW_ATTENTION_KINDS = (("bf16", "half"), ("fp32", "tf32"), ("fp32", "ieee"))  # of 16 bits bfloat16 stands for both
WINDOW_ATTENTION_WIDTHS = (16, 64, 128, 256)  # the narrowest, and the widest of each tile


def window_attention_variants(arch: str) -> Iterator[Variant]:
    """Window attention with all that it can do, with dropout and without, and in half precision with nothing of it."""
    kernels = ("fwd", "bwd_bases", "bwd_queries", "bwd_keys")
    for kernel, (dtype, kind) in itertools.product(kernels, WINDOW_ATTENTION_KINDS):
        if arch == "sm_75" and kind != "ieee":
            continue  # the launcher leaves these to PyTorch there
        widths = [width for width in WINDOW_ATTENTION_WIDTHS if width <= tiles.window_attention_width(kind)]
        for width in widths:
            yield window_attention_variant(kernel, arch, dtype, kind, width)
            if kernel != "bwd_bases":
                yield window_attention_variant(kernel, arch, dtype, kind, width, dropout=True)
                if kind == "half":
                    yield window_attention_variant(kernel, arch, dtype, kind, width, is_bare=True)
    for width in WINDOW_ATTENTION_WIDTHS:
        shape = {"BLOCK_M": tiles.WINDOW_COMBINE_ROWS, "BLOCK_D": tiles.width_block(width)}
        yield Variant("window_attention_combine", arch, "bf16", shape, num_warps=4, num_stages=3)


def window_attention_variant(
    kernel: str, arch: str, dtype: str, kind: str, width: int, dropout: bool = False, is_bare: bool = False
) -> Variant:
    """One of its kernels with the tile that it is launched with: masked, causal and with absent slots, or bare."""
    tile = tiles.window_attention(kernel, kind, width, dropout, arch)
    name = f"window_attention_{kernel}"
    constants = {
        **{"dout_strides": (None, None, 1), "q_strides": (None, None, 1)},  # of what is contiguous
        **{"c_strides": (None, None, None, 1), "p_strides": (None, 1)},
        **dict.fromkeys(("NEED_DC", "NEED_DP", "IS_ALIGNED"), True),
        **dict.fromkeys(("HAS_MASK", "HAS_ABSENT", "CAUSAL"), not is_bare),
        "DROPOUT": dropout,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tiles.width_block(width),
    }
    taken = inspect.signature(KERNELS[name].fn).parameters
    constants = {key: value for key, value in constants.items() if key in taken}
    return Variant(name, arch, dtype, constants, tile.num_warps, tile.num_stages)


def frozen_head_variants(arch: str) -> Iterator[Variant]:
    """The softmax of a frozen head with and without its gradient."""
    tile = tiles.SOFTMAX
    for dtype, gradient in itertools.product(("bf16", "fp16", "fp32"), (True, False)):
        constants = {"HAS_BIAS": True, "NEED_GRADIENT": gradient, "BLOCK_V": tile.block_v}
        yield Variant("frozen_head_softmax", arch, dtype, constants, tile.num_warps, num_stages=3)


def variants() -> Iterator[Variant]:
    """Everything that `static.csv` has a row for."""
    kinds = (siva_linear_variants, mezo_perturb_variants, window_attention_variants, frozen_head_variants)
    for of_kernels, arch in itertools.product(kinds, TARGETS):
        yield from of_kernels(arch)


def source_hash(kernel: str) -> str:
    """Identifies the text of the functions in the kernel's module, and in those from which it takes any."""
    modules, functions = [inspect.getmodule(KERNELS[kernel].fn)], {}
    for module in modules:  # which grow meanwhile
        # a kernel, compiled or interpreted, holds its Python function, and one that is tuned holds a kernel
        members = [getattr(member, "fn", None) for member in vars(module).values()]
        found = [each for each in (getattr(member, "fn", member) for member in members) if inspect.isfunction(each)]
        functions |= dict.fromkeys(found)
        modules += [home for home in dict.fromkeys(map(inspect.getmodule, found)) if home not in modules]
    return hashlib.sha256("".join(map(inspect.getsource, functions)).encode()).hexdigest()[:12]


def compile_variant(variant: Variant) -> Any:
    """What Triton makes of it, specialised as its launchers do: on AMD by tensors of less than 2 GB too."""
    kernel = KERNELS[variant.kernel]
    types = ARGUMENT_TYPES.get(variant.kernel, {})
    signature, attributes, constants = {}, {}, {}

    def argument(name: str, default: str, place: tuple[int, ...]) -> str:
        kind = types.get(name, default)
        is_any = name in ANY or (name == "K" and "window" in variant.kernel)  # a count of keys there, a width in others
        found = [] if is_any else [["tt.divisibility", SPECIALISED]]
        if kind.startswith("*") and variant.arch.startswith("gfx"):
            found.append(["tt.pointer_range", 32])
        if found:
            attributes[place] = found
        return kind

    for position, name in enumerate(inspect.signature(kernel.fn).parameters):
        constant = variant.constants.get(name)
        if isinstance(constant, tuple):
            default = f"*{variant.dtype}" if name.endswith("_ptrs") else "i32"
            places = {(position, place): item for place, item in enumerate(constant)}
            constants |= {place: item for place, item in places.items() if item is not None}
            signature[name] = tuple(
                argument(name, default, place) if item is None else "constexpr" for place, item in places.items()
            )
        elif name in variant.constants:
            signature[name] = "constexpr"
            constants[(position,)] = constant
        else:
            signature[name] = argument(name, f"*{variant.dtype}" if name.endswith("_ptr") else "i32", (position,))
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=TARGETS[variant.arch],
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.kernel != "mezo_perturb",  # every operation of the noise is rounded
        },
    )


def compile_row(variant: Variant) -> dict[str, str]:
    """Compile `variant` and return its row."""
    compiled = compile_variant(variant)
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
    usage, code = _dump(asm, "cuobjdump", "--dump-resource-usage"), _dump(asm, "nvdisasm", "--print-code")
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1]), code


def gaussian_per_element(arch: str, dtype: str) -> float:
    """Instructions that a thread of the Triton pass executes for an element: of one term, rounded to nearest."""
    constants = {"dtype": MEZO_DTYPES[dtype], "IS_RADEMACHER": False, "IS_STOCHASTIC": False}
    tile = tiles.MEZO_PERTURB
    constants |= {"BLOCK_Q": tile.block_q}
    compiled = compile_variant(Variant("mezo_perturb", arch, dtype, constants, tile.num_warps, num_stages=3))
    code = _dump(compiled.asm, "cuobjdump", "--dump-sass")
    return executed(code, [("", 0), (_BEND, 0), (_BEND, -1), ("EXIT", 0)]) / (8 * tile.block_q / (32 * tile.num_warps))


def stores_in_loop(arch: str, width: int) -> int:
    """Stores to shared memory in the loop of window attention's forward, in half precision without dropout."""
    compiled = compile_variant(window_attention_variant("fwd", arch, "bf16", "half", width))
    lines = _instructions(_dump(compiled.asm, "cuobjdump", "--dump-sass"))
    jumps = {at: _target(text) for at, text in lines if "BRA " in text}
    loops = [[text for at, text in lines if start <= at <= end] for end, start in jumps.items()]
    (loop,) = (loop for loop in loops if sum("MMA." in text for text in loop) > 1)
    return sum(re.match(r"(@\S+ )?STSM?\b", text) is not None for text in loop)


def _read_amdgcn(asm: dict[str, Any]) -> tuple[int, int, str]:
    """Vector registers a thread, bytes of private memory, and the assembly."""
    code = asm["amdgcn"]
    stack = re.search(r"\.private_segment_fixed_size:\s*(\d+)", code)[1]
    return int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1]), int(stack), code


def _dump(asm: dict[str, Any], tool: str, option: str) -> str:
    """What a tool of NVIDIA's prints of the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        return _run(tool, option, cubin)


def _run(tool: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def cuda_source_hash() -> str:
    """Identifies the text of the CUDA module's kernels."""
    files = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").iterdir()])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


_CUDA_DTYPES = {"f": "float32", "d": "float64", "NS_8BFloat16E": "bfloat16", "NS_7Float16E": "float16"}
_CUDA_COUNTS = {  # pattern of an instruction's name
    "instructions": r"[A-Z]",
    "wide_loads": r"LDG\.E\S*\.128",
    "wide_stores": r"STG\.E\S*\.128",
    "fused": r"[FD]FMA",
}
_LOAD, _STORE, _BEND = r"LDG\.E\S*\.128", r"STG\.E\S*\.128", r"F(MUL|ADD) .*\|"  # |g| is in the noise alone


def cuda_rows(module: Path) -> list[dict[str, str]]:
    """A row for each kernel and architecture in the compiled module."""
    usage = {
        (arch, kernel): (registers, stack)
        for arch, part in _by_arch(_run("cuobjdump", "--dump-resource-usage", module))
        for kernel, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", part)
    }
    rows = []
    for arch, part in _by_arch(_run("cuobjdump", "--dump-sass", module)):
        for kernel, code in re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", part, re.DOTALL):
            dtype, is_rademacher = re.search(r"perturbI(f|d|NS_\w+?E)Lb([01])E", kernel).groups()
            names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code)
            once_round = [(_LOAD, 0), (_BEND, 0), (_BEND, -1), (_STORE, -1), (_LOAD, 0)]
            per_octet = executed(code, once_round) if is_rademacher == "0" else None
            registers, stack = usage[arch, kernel]
            rows.append(
                {
                    "kernel": "mezo_perturb",
                    "arch": arch,
                    "dtype": _CUDA_DTYPES[dtype],
                    "tile": "rademacher" if is_rademacher == "1" else "gaussian",
                    "registers": registers,
                    "stack_bytes": stack,
                    **{
                        column: str(sum(bool(re.match(pattern, name)) for name in names))
                        for column, pattern in _CUDA_COUNTS.items()
                    },
                    "per_element": "" if per_octet is None else f"{per_octet / 8:.1f}",
                    "source": cuda_source_hash(),
                }
            )
    return sorted(rows, key=lambda row: (int(row["arch"].removeprefix("sm_")), row["dtype"], row["tile"]))


def executed(code: str, stops: Sequence[tuple[str, int]]) -> int:
    """The fewest instructions that a thread executes on its way along some instructions.

    Args:
        code: of one kernel, as `cuobjdump --dump-sass` prints it.
        stops: of each a pattern, and which of the instructions that it is found in: 0 is the first, -1 the last. The
            last stop is not counted.
    """
    lines = _instructions(code)
    place = {at: number for number, (at, _) in enumerate(lines)}

    def followers(number: int) -> list[int]:
        text = lines[number][1]
        name = text.split()[1 if text.startswith("@") else 0]
        after = [number + 1] if number + 1 < len(lines) else []
        if name.startswith(("BRA", "CALL")):  # a call that does not return is a jump
            to = place[_target(text)]
            return [to, *after] if re.search(r"\bU?P\d", text) else [to]
        return [] if text.startswith("EXIT") else after

    def steps(start: int, end: int) -> int:
        seen, front, count = {start}, [start], 0
        while front:
            count += 1
            front = [after for number in front for after in followers(number)]
            if end in front:
                return count
            front = [number for number in dict.fromkeys(front) if number not in seen]
            seen.update(front)
        raise ValueError(f"no way leads from {lines[start]} to {lines[end]}")

    numbers = [[n for n, (_, text) in enumerate(lines) if re.search(stop, text)][which] for stop, which in stops]
    return sum(steps(start, end) for start, end in itertools.pairwise(numbers) if start != end)


def _instructions(code: str) -> list[tuple[int, str]]:
    """The address and the text of each instruction that `cuobjdump --dump-sass` prints."""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", code)]


def _target(jump: str) -> int:
    """The address that an instruction jumps to."""
    return int(re.findall(r"0x([0-9a-f]+)", jump)[-1], 16)


def _by_arch(dump: str) -> list[tuple[str, str]]:
    """The parts of a dump of machine code, one for each architecture."""
    return re.findall(r"^arch = (sm_\d+)$(.*?)(?=^Fatbin |\Z)", dump, re.DOTALL | re.MULTILINE)


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench.static compiles kernels, and TRITON_INTERPRET=1 replaces the compiler; unset it.")
    named = sys.argv[1:] or list(KERNELS)
    if unknown := set(named) - KERNELS.keys():
        sys.exit(
            f"bench.static knows no kernel {', '.join(sorted(unknown))}; name some of {', '.join(KERNELS)}, or none."
        )
    kept = {tuple(row[column] for column in KEY): row for row in read_rows(FILE) if row["kernel"] not in named}
    write_rows(FILE, [kept.get(tuple(variant.key().values())) or compile_row(variant) for variant in variants()])
    module = ROOT / "fastpeft" / "_C_cuda.abi3.so"
    if module.exists():
        write_rows(CUDA_FILE, cuda_rows(module))
    else:
        print(f"{CUDA_FILE.name} stays as it is: fastpeft._C_cuda was not built here", file=sys.stderr)


if __name__ == "__main__":
    main()
