"""How a launch of SiVA's kernels is cut into programs, and its operands as they read them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpeft.kernels import tiles


class Plan(NamedTuple):
    """How a launch is cut into programs, whether they compute p, and into how many ranges K is cut."""

    tile: tiles.Tile
    project: bool
    ranges: int
    constants: dict[str, int]  # of the kernels of h and of dx

    def descriptors(
        self, x: Tensor, weight: Tensor, v: Tensor, weight_block: tuple[int, int]
    ) -> tuple[TensorDescriptor | None, ...]:
        """What the kernel reads x, W and V by, or dh, W and U^T: nothing where it takes their addresses."""
        if not self.tile.tma:
            return None, None, None
        block_k = self.tile.block_k
        of_v = _descriptor(v, (self.constants["BLOCK_R"], block_k)) if self.project else None
        return _descriptor(x, (self.tile.block_m, block_k)), _descriptor(weight, weight_block), of_v


def plan_of(
    x: Tensor | list[Tensor],
    weights: list[Tensor],
    vs: list[Tensor],
    columns: tuple[int, ...],
    ranks: tuple[int, ...],
    ways: tuple[str, ...],
) -> Plan:
    """Of products of x `(M, K)` with W and V, into `(M, columns)`; a list of x is added up, each with its own.

    Args:
        ways: which of `tiles.WAYS` to choose from. Where descriptors cannot be, or no tile takes them, a way by TMA is
            the same without; they can be of what is aligned, of one layer only if products are added up.
    """
    operands = [x] if isinstance(x, Tensor) else x
    gpu = tiles.gpu(weights[0].device)
    has_tma = any(tile.tma for tile in tiles.siva_linear_tiles(gpu.architecture)) and not operands[1:]
    if not (has_tma and all(map(_is_describable, (*operands, *weights, *vs)))):
        ways = tuple(dict.fromkeys(way.removesuffix(" tma") for way in ways))
    k = sum(each.shape[1] for each in operands)
    choice = tiles.siva_linear((len(operands[0]),), k, columns, max(ranks), gpu, ways, len(ranks) > 1)
    constants = tiles.siva_linear_constants(choice.tile, choice.project, max(ranks), gpu)
    return Plan(*choice, {"PROJECT": choice.project, "TMA": choice.tile.tma, **constants})


def _is_describable(matrix: Tensor) -> bool:
    """Whether the tensor memory accelerator can read it: by aligned rows of elements side by side."""
    pitch = _pitch(matrix)
    is_dense = matrix.numel() > 0 and matrix.stride(1) == 1 and pitch >= matrix.shape[1]
    return is_dense and pitch * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


def _pitch(matrix: Tensor) -> int:
    """How far its rows are apart; the stride of a single row says nothing."""
    return matrix.stride(0) if len(matrix) > 1 else matrix.shape[1]


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), [_pitch(matrix), 1], list(block))


def lengths(tensors: list[Tensor]) -> tuple[int, ...]:
    """N of each weight `(N, K)`, R of each s `(R,)`."""
    return tuple(t.shape[0] for t in tensors)


def strides_of(matrices: list[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The strides of the rows of each, and of the columns."""
    return tuple(matrix.stride(0) for matrix in matrices), tuple(matrix.stride(1) for matrix in matrices)


def like(x: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The factors that are read anew at each step along K, contiguous and in the dtype of x."""
    return [t if t.dtype == x.dtype and t.is_contiguous() else x.new_empty(t.shape).copy_(t) for t in factors]


def dense(*operands: list[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
    """The factors of all layers, each contiguous."""
    return tuple(tuple(t.contiguous() for t in each) for each in operands)
