"""Peak memory, measured and simulated, in bytes of live tensors.

A simulated step runs on fake tensors, which have shapes and dtypes but no data, under a tracker of live storages. A
GPU's fused forms are counted on every device: attention keeps no T x T probabilities, dropout keeps one byte per
element, AdamW makes no temporaries.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastpeft.errors import FastpeftError
from fastpeft.ops.frozen_head_cross_entropy import bytes_of_chunk
from fastpeft.training.optimizer_in_backward import StepsInBackward

MEBIBYTE = 2**20

OptimizerFactory = Callable[[list[Tensor]], torch.optim.Optimizer]


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of live tensor storages, real or fake: `current` now and `peak` since the last `reset_peak`.

    A storage counts once however many views it has, from the first op that returns it (or from `add`) until its last
    reference goes. What an op allocates inside itself is not seen, but with `estimate_inside` estimated.

    Example:
        >>> with MemoryTracker() as tracker:
        ...     x = torch.zeros(256)
        >>> tracker.peak
        1024
    """

    def __init__(self, estimate_inside: bool = False) -> None:
        super().__init__()
        self.estimate_inside = estimate_inside
        self.current = 0
        self.peak = 0
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of `tensors` from now on."""
        for tensor in tensors:
            storage: Any = tensor if tensor.is_mkldnn else tensor.untyped_storage()  # a pack has none
            nbytes = tensor.nbytes if tensor.is_mkldnn else storage.nbytes()
            key = id(storage)
            reference, before = self._live.get(key) or (weakref.ref(storage, partial(self._free, key)), 0)
            self._live[key] = (reference, nbytes)  # its size can change in place
            self.current += nbytes - before
        self.peak = max(self.peak, self.current)

    def _free(self, key: int, _: object) -> None:
        self.current -= self._live.pop(key)[1]

    def reset_peak(self) -> None:
        """Start a new measurement from what is live now."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        if self.estimate_inside:
            self.peak = max(self.peak, self.current + _inside(str(func), args))
        return output


def _inside(op: str, args: Any) -> int:
    """What a large fused op allocates inside itself, in bytes; 0 for any other op."""
    if op == "fastpeft.frozen_head_cross_entropy.default":
        return bytes_of_chunk(*args[:2])
    # a weight of few bits as numbers in the dtype of x; products by C++ on a CPU make some rows of it at a time
    if op == "bitsandbytes.gemm_4bit.default":  # not where x has few rows
        shape = args[2]
    elif op in ("fastpeft.quantised_linear.default", "fastpeft.quantised_linear_backward.default"):
        shape = args[0].shape[-1], args[3]
    elif op in ("fastpeft.siva_linear.default", "fastpeft.siva_linear_backward.default"):
        (x, *_), operands = (args[:1], args[2:]) if "backward" not in op else (args[0], args[3:])
        scales, us, _, vs, *_ = operands
        numbers = sum(len(u) * v.shape[1] for each, u, v in zip(scales, us, vs, strict=True) if each is not None)
        return int(numbers * x.element_size())
    else:
        return 0
    return int(math.prod(shape) * args[0].element_size())


class _FusedForms(TorchFunctionMode):
    """Runs attention and dropout as a GPU's fused ops.

    A single random number is the highest, so that what a module leaves out by chance is there.
    """

    _HIGHEST = 1 - 2**-24  # that `torch.rand` gives in float32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        output = func(*args, **kwargs)
        if func is torch.rand and output.numel() == 1:
            return torch.tensor(self._HIGHEST if output.dim() == 0 else [self._HIGHEST])
        return output

    @staticmethod
    def _attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,  # fused kernels read grouped heads in place
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype is torch.bool:
            # every fused kernel adds its mask, in the dtype of the query, and keeps it for backward
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        if attn_mask is not None and attn_mask.requires_grad:  # as T5's, of its positions: on a CPU no kernel is fused
            composed = torch.ops.aten._scaled_dot_product_attention_math
            return composed(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    @staticmethod
    def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _ZeroScalars(TorchDispatchMode):
    """Answers zero where a branch reads a fake tensor's data: `mask.all()` is False, so the mask is kept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor)
        if read and args[0].constant is None:
            dtype = args[0].dtype
            return False if dtype is torch.bool else 0.0 if dtype.is_floating_point else 0
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory of one training step, in bytes.

    Attributes:
        weights: all parameters and buffers, trained or not, each storage once.
        gradients: of the trained parameters; 0 where the optimizer steps in backward: they then count as activations.
        optimizer: the optimizer's state.
        peak: the most that is live at one time, from the forward pass to the optimizer's step.
    """

    weights: int
    gradients: int
    optimizer: int
    peak: int

    @property
    def activations(self) -> int:
        """What the peak holds above weights, gradients and optimizer state: activations, batch and temporaries."""
        return self.peak - self.weights - self.gradients - self.optimizer


def fused_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    """AdamW in its fused form, which makes no temporaries."""
    return torch.optim.AdamW(params, fused=True)


class BlockwiseAdamW(torch.optim.Optimizer):
    """The state of bitsandbytes' 8-bit AdamW, in float32 for parameters at the indices `in_float`; trains nothing."""

    _BLOCK, _LEAST = 256, 4096  # values that share a scale; values of the smallest tensor in 8 bits

    def __init__(self, params: list[Tensor], in_float: Collection[int] = ()) -> None:
        super().__init__(params, {})
        self._in_float = {params[index] for index in in_float}
        self._maps = [torch.empty(256) for _ in range(2)]  # what the codes stand for

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if parameter in self.state:
                continue
            whole = parameter.numel() < self._LEAST or parameter in self._in_float
            moments = [torch.empty_like(parameter, dtype=torch.float32 if whole else torch.uint8) for _ in range(2)]
            blocks = 0 if whole else -(-parameter.numel() // self._BLOCK)
            scales = [torch.empty(blocks, device=parameter.device) for _ in range(2)]
            self.state[parameter] = {"moments": moments, "scales": scales}


def embeddings_in_float(model: nn.Module) -> list[int]:
    """Indices of the trained parameters that belong to embeddings, whose state `transformers.Trainer` keeps whole."""
    embedded = {weight for layer in model.modules() if isinstance(layer, nn.Embedding) for weight in layer.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [index for index, parameter in enumerate(trained) if parameter in embedded]


def simulate_training_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer_factory: OptimizerFactory | None = fused_adamw,
    autocast_dtype: torch.dtype | None = None,
    optimizer_in_backward: bool = False,
    estimate_inside: bool = True,
    measured: Mapping[str, Any] | None = None,
) -> MemoryEstimate:
    """Memory of one steady training step (forward, loss, backward, optimizer step) of `model`, without running it.

    Args:
        model: any module whose `model(**batch)` returns a scalar loss, or an output with a `.loss`, in training mode.
            Its weights are neither read nor changed.
        batch: the keyword arguments of the forward pass; tensors give shapes and dtypes.
        optimizer_factory: makes the optimizer of the trained parameters. None: forward passes alone, as MeZO's.
        autocast_dtype: run forward and loss under autocast in this dtype, by the rules of the weights' device.
        optimizer_in_backward: whether the optimizer steps in backward, as `StepsInBackward` lets it.
        estimate_inside: add what the library's own ops and bitsandbytes' products make inside themselves on a GPU.
        measured: the keyword arguments of a forward pass in evaluation mode before the step, whose own peak does not
            count, but what it leaves does: packs of frozen weights, which fewer rows may not ask for.

    Raises:
        FastpeftError: nothing in the model is trained, or its output holds no loss.

    Notes:
        Counts tensors at the bytes they ask for; an allocator's rounding, a library's workspaces and the noise that
        MeZO's reference makes come on top. Gradients are taken as freed between steps. An attention mask is taken to
        mask something.

    Example:
        >>> class Model(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).sum()
        >>> simulate_training_step(Model(16, 4), {"x": torch.zeros(8, 16)}).weights
        272
    """
    fakes, tracker = FakeTensorMode(allow_non_fake_inputs=True), MemoryTracker(estimate_inside)
    real = {name: tensor for named in (model.named_parameters, model.named_buffers) for name, tensor in named()}
    state: dict[str, Tensor] = {name: fakes.from_tensor(tensor) for name, tensor in real.items()}
    # a weight of a kind of its own, as bitsandbytes', knows more than its values: it stays, and ops meet it as its fake
    put_in = {f"model.{name}": fake for name, fake in state.items() if type(real[name]) in (Tensor, nn.Parameter)}
    beside = [fakes.from_tensor(tensor) for weight in real.values() for tensor in scales_of(weight)]
    trained = [tensor for tensor in state.values() if tensor.requires_grad]
    if not trained:
        raise FastpeftError(
            "The model to simulate has no trained parameter; a training step needs one with requires_grad=True."
        )
    device = trained[0].device.type
    modes = [(module, module.training) for module in model.modules()]
    model.train(optimizer_factory is not None)
    try:
        with ExitStack() as stack:
            for mode in (fakes, tracker, _ZeroScalars(), _FusedForms()):
                stack.enter_context(mode)
            tracker.add([*state.values(), *beside])
            weights = tracker.current
            optimizer, gradients, optimizer_state = None, 0, 0
            if optimizer_factory is not None:
                optimizer, gradients, optimizer_state = _make_optimizer(optimizer_factory, trained, tracker)
                if optimizer_in_backward:
                    gradients = 0
                    StepsInBackward(optimizer)
            autocast = torch.autocast(device, autocast_dtype, enabled=autocast_dtype is not None)
            if measured is not None:
                given = tree_map_only(Tensor, fakes.from_tensor, dict(measured))
                model.eval()
                torch.func.functional_call(_Pass(model, autocast, False), put_in, kwargs=given)
                model.train(optimizer is not None)
            fake_batch = tree_map_only(Tensor, fakes.from_tensor, dict(batch))
            tracker.add(leaf for leaf in tree_leaves(fake_batch) if isinstance(leaf, Tensor))
            tracker.reset_peak()
            torch.func.functional_call(_Pass(model, autocast, optimizer is not None), put_in, kwargs=fake_batch)
            if optimizer is not None:
                optimizer.step()
    finally:
        _put_back(model, real)
        for module, training in modes:
            module.training = training
    return MemoryEstimate(weights, gradients, optimizer_state, tracker.peak)


def _make_optimizer(
    factory: OptimizerFactory, trained: list[Tensor], tracker: MemoryTracker
) -> tuple[torch.optim.Optimizer, int, int]:
    """An optimizer that has made a step, and the bytes of the gradients and of its state."""
    before = tracker.current
    optimizer = factory(trained)
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    gradients = tracker.current - before
    optimizer.step()
    optimizer.zero_grad()
    return optimizer, gradients, tracker.current - before


class _Pass(nn.Module):
    """Forward and backward of a model in one call, in which what computes activations again meets the same weights."""

    def __init__(self, model: nn.Module, autocast: torch.autocast, backward: bool) -> None:
        super().__init__()
        self.model, self.autocast, self.backward = model, autocast, backward

    def forward(self, **batch: Any) -> None:
        with self.autocast, torch.set_grad_enabled(self.backward):
            loss = _loss(self.model(**batch))
        if self.backward:
            _run_backward(loss)


def _run_backward(loss: Tensor) -> None:
    """`loss.backward()` in which the modes of torch functions stay: where a tensor is given, they are left."""
    torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss))


def scales_of(weight: Tensor) -> Iterator[Tensor]:
    """The tensors that belong to a weight of bitsandbytes in 4 bits; of any other there are none."""
    state = getattr(weight, "quant_state", None)
    while state is not None:  # whose scales may be quantised too
        yield from (tensor for tensor in (state.absmax, state.code, state.offset) if tensor is not None)
        state = state.state2


def _loss(output: Any) -> Tensor:
    """The scalar loss in a model's output."""
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if loss is None or loss.dim() > 0:
        raise FastpeftError(
            f"The model to simulate returned {type(output).__name__} without a scalar loss; give a batch with labels, "
            "or a model that returns its loss."
        )
    return loss


def _put_back(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a model its own tensors again.

    `functional_call` leaves its last ones where two modules share a dictionary of parameters, as PEFT's of tied tokens.
    """
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        for held in (module._parameters, module._buffers):
            if key in held:
                held[key] = tensor  # type: ignore[assignment]


def peak_rss_mb() -> float | None:
    """Peak resident memory of this process, in MB (2^20 bytes); None where the system does not say."""
    try:
        import resource  # absent on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS and kibibytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEBIBYTE, 1)
