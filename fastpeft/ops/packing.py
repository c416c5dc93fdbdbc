"""A frozen weight in the layout that a product reads fastest, made once.

A product on a CPU reorders its weight at every call, because the weight may have changed. One that is frozen has not:
oneDNN packs it once. A pack is a copy in another layout and perhaps another dtype. It is made at first use, never
saved or copied, and dropped when the weight changes.

On a GPU a product reads a weight as it lies. Autocast would cast it at every call; there the pack is the cast copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from fastpeft.ops.define import is_captured
from fastpeft.support.processor import has_bfloat16

_SAMPLES = 61  # entries of a weight that are compared; a prime, so that they fall into different columns
_PLAIN = (Tensor, torch.nn.Parameter)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # NaN equals itself as an integer


def can_pack(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN packs this weight: dense, on a CPU that multiplies in float32 or bfloat16, with entries."""
    return (
        (type(weight) in _PLAIN or isinstance(weight, FakeTensor))  # not what shards or counts
        and weight.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
        and multiplies_in(dtype)
        and weight.numel() > 0
        and _is_dense(weight)
        and not torch.compiler.is_compiling()  # the compiler has a choice of its own
    )


@cache
def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this processor: in bfloat16 from AVX-512 on."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32 or (dtype is torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()))


def can_lower(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether a copy of this weight in `dtype` is kept: on a GPU, where that is another than its own.

    Not for a CUDA graph, which would go on reading the copy after the weight has changed.
    """
    return (
        (type(weight) in _PLAIN or isinstance(weight, FakeTensor))
        and weight.device.type == "cuda"
        and weight.dtype is not dtype
        and not torch.compiler.is_compiling()
        and not is_captured()
    )


def pack(weight: Tensor) -> Tensor:
    """`weight` `(N, K)` in oneDNN's layout; `to_dense()` gives the same bits back. For what `can_pack` allows.

    Of a fake tensor, by which memory is simulated, it is a copy: as many bytes.
    """
    if isinstance(weight, FakeTensor):
        return weight.detach().clone(memory_format=torch.contiguous_format)
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    return packed


def dense(weight: Tensor) -> Tensor:
    """`weight` itself, or what a pack was made of."""
    return weight.to_dense() if weight.is_mkldnn else weight


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for a packed W, all of one dtype, outside of autograd; no view, as `fastpeft.ops.products` says."""
    bias = None if bias is None else bias.contiguous()  # oneDNN does not look at its strides
    h: Tensor = (
        torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        if packed.is_mkldnn
        else F.linear(x, packed, bias)  # a fake one
    )
    return h if h.dim() == 2 else torch.ops.aten._unsafe_view.default(h, h.shape)  # it was made as a matrix


Codes = tuple[Tensor, Tensor, Tensor]  # int8 (N, K), float32 scales (N, 1), int32 sums of rows (N,)


def quantise_rows(matrix: Tensor) -> Codes:
    """Each row of a float32 `(N, K)` divided by its largest magnitude and rounded to 255 even steps."""
    largest = matrix.abs().amax(1, keepdim=True) if matrix.shape[1] else matrix.new_zeros(len(matrix), 1)
    scales = largest.clamp_min(torch.finfo(torch.float32).tiny) / 127
    codes = (matrix / scales).round().to(torch.int8)
    return codes, scales, codes.sum(1, dtype=torch.int32)


def operand(weight: Tensor, packs: Packs | None, x: Tensor, transposed: bool = False) -> Tensor:
    """What a product of `x` reads: the pack of `weight`, or of its transpose, else the weight itself in x's dtype."""
    if is_token(x, weight):
        return weight
    if not (packs is None or torch.compiler.is_compiling() or torch.jit.is_tracing()):
        packed = packs.of(weight, x.dtype, transposed, num_rows(x))
        if packed is not None:
            return packed
    return weight if weight.dtype is x.dtype else weight.to(x.dtype)


def num_rows(x: Tensor) -> int:
    """M of `(*, K)`."""
    return x.numel() // max(1, x.shape[-1])


def is_token(x: Tensor, weight: Tensor) -> bool:
    """Whether x is one row in float32 on a CPU, as where a decoder says a token.

    To decide how to multiply it would take a fifth of the product's time.
    """
    return (
        x.numel() == x.shape[-1]
        and x.dtype is weight.dtype is torch.float32
        and not weight.is_mkldnn
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
    )


def is_faster_packed(rows: int, dtype: torch.dtype) -> bool:
    """Whether a pack makes a product of so many rows a tenth faster, for a weight in the dtype of the product.

    One row reads the whole weight once for little work, and the product by a pack takes longer to begin.
    """
    return 1 < rows <= _most_rows_packed(dtype)


@cache
def _most_rows_packed(dtype: torch.dtype) -> float:
    """Measured on a processor with AVX512-BF16 and on the same held to fewer instructions, see docs/methods/kernels.md.

    What was not measured, such as ARM, packs nothing: a pack takes as much memory as the weight.
    """
    if dtype is torch.float32:
        return {"AVX512": math.inf, "AVX2": 64}.get(torch.backends.cpu.get_cpu_capability(), 0)
    return 64 if has_bfloat16() else 0


class Packs:
    """The packs of one frozen weight: of W for the product, of W^T for the gradient of its input, one a dtype.

    Args:
        enabled: False packs nothing, which saves memory.

    Notes:
        A change of the weight is noticed by its place, version, dtype and some sampled entries: the last see what
        writes `weight.data += delta`, as PEFT's merge does, which leaves place and version alone. On a GPU no entry
        is looked at, since that would wait for it: before such a write call `drop`. Copies and pickles of packs are
        empty.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._packed: dict[tuple[torch.dtype, bool], Tensor] = {}
        self._copies: dict[tuple[torch.dtype, torch.device], tuple[tuple[Any, ...], Tensor]] = {}
        self._codes: Codes | None
        self._signature: tuple[Any, ...]
        self._samples: Tensor  # entries of the weight where it lies
        self._sampled: Tensor  # and what they were
        self.drop()

    def of(
        self, weight: Tensor, dtype: torch.dtype, transposed: bool = False, rows: int | None = None
    ) -> Tensor | None:
        """The pack of `weight` `(N, K)` in `dtype`, or of its transpose.

        None where there is none to be had, and where a product of so many rows is faster without one.
        """
        if self.enabled and can_lower(weight, dtype):
            lowered = self._lowered(weight, dtype)
            return lowered.t() if transposed else lowered
        found = self._packed.get((dtype, transposed))
        if found is None and not (self.enabled and can_pack(weight, dtype)):
            return None
        if rows is not None and weight.dtype is dtype and not is_faster_packed(rows, dtype):
            return None
        if self._holds(weight):
            found = self._packed.get((dtype, transposed))  # after it holds: another thread may have noticed a change
            if found is not None:
                return found
        elif self.enabled and can_pack(weight, dtype):
            self._begin(weight)
        else:
            return None
        matrix = weight.detach().t() if transposed else weight
        found = self._packed[dtype, transposed] = pack(matrix.to(dtype))
        return found

    def _lowered(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The copy in another dtype, noticing a change without waiting for the device.

        One a device, because `nn.DataParallel` shares a layer's packs among the threads of its replicas.
        """
        place = None if isinstance(weight, FakeTensor) else weight.data_ptr()
        signature = place, *_signature(weight)
        kept = self._copies.get((dtype, weight.device))
        if kept is None or kept[0] != signature:
            with torch.inference_mode(False):  # what is made there cannot be kept for backward
                kept = signature, weight.detach().to(dtype)
            self._copies[dtype, weight.device] = kept
        return kept[1]

    def codes(self, weight: Tensor) -> Codes:
        """`weight` `(N, K)` in int8, as `fastpeft::int8_linear` takes it."""
        if not _is_dense(weight):  # a change would not show
            return quantise_rows(weight.detach().float())
        if self._codes is None or not self._holds(weight):
            self._begin(weight)
            self._codes = quantise_rows(weight.detach().float())
        return self._codes

    def _begin(self, weight: Tensor) -> None:
        """Drop what was packed of other values."""
        self.drop()
        self._signature = _signature(weight)
        if not isinstance(weight, FakeTensor):
            self._samples = samples(weight)
            self._sampled = self._samples.clone()

    def _holds(self, weight: Tensor) -> bool:
        """Whether what is kept is of this weight as it is now. It runs at every call of a layer."""
        return _signature(weight) == self._signature and (
            type(weight) not in _PLAIN
            # the place before what is read there: it may be freed
            or (weight.data_ptr() == self._samples.data_ptr() and self._same_samples())
        )

    def _same_samples(self) -> bool:
        if not _len_torch_dispatch_stack():
            return torch.equal(self._samples, self._sampled)
        # the first call of a layer compares nothing, but selective checkpointing wants the same ops again in backward
        with _disable_current_modes():
            return torch.equal(self._samples, self._sampled)

    def drop(self) -> None:
        """Forget all packs, and the weight."""
        self._packed.clear()
        self._copies.clear()
        self._codes = None
        self._signature = ()
        self._samples = self._sampled = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Bytes that the packs take now."""
        copies = [copy for _, copy in self._copies.values()]
        kept = [*self._packed.values(), *copies, *(self._codes or ())]
        return sum(each.numel() * each.element_size() for each in kept)

    def __deepcopy__(self, _memo: dict[int, Any]) -> Packs:
        return Packs(self.enabled)

    def __reduce__(self) -> tuple[Callable[..., Packs], tuple[bool]]:
        return Packs, (self.enabled,)


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; 0 for a tensor of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _signature(weight: Tensor) -> tuple[Any, ...]:
    if isinstance(weight, FakeTensor):
        return (id(weight),)
    return version_of(weight), weight.dtype, weight.shape, weight.stride()


def _is_dense(weight: Tensor) -> bool:
    """Whether the weight lies in one piece, by rows or by columns, so that its `samples` are a view."""
    return weight.is_contiguous() or weight.t().is_contiguous()


def samples(weight: Tensor) -> Tensor:
    """Some entries of the weight, beginning with the first, as integers: a view of it."""
    stored = weight.detach()
    flat = (stored if stored.is_contiguous() else stored.t()).view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].view(_BITS[flat.element_size()])
