"""Language models that make no logits for their loss: `fuse_head` tells the LM head.

Where a model is given labels, its decoder answers with `LazyLogits`, which the model hands to its own loss. The cross
entropy of these is `frozen_head_cross_entropy`; what else reads them makes them. So the model's code decides what the
loss is, with its shift of labels, ignored tokens and number of items, and no code of a model is replaced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fastpeft.errors import FastpeftError
from fastpeft.ops.dtypes import autocast_dtype, compute_dtype, no_autocast
from fastpeft.ops.frozen_head_cross_entropy import loss_of_head, tokens_of_chunk
from fastpeft.ops.frozen_linear import PackedLinear, unpack_frozen
from fastpeft.ops.packing import version_of

logger = logging.getLogger(__name__)

# what logits are asked that have no values; by these names functions and methods of torch ask it
_FACTS = {"size", "dim", "ndimension", "numel", "__len__", "is_floating_point", "is_complex", "stride", "is_contiguous"}
_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "is_quantized")
# in truth they may require one, but who hooks onto outputs that do would make them
_NO_GRADIENT = ("requires_grad", "grad_fn", "is_leaf")


class LazyLogits(Tensor):
    """`hidden W^T + b`, `(*, V)`: a tensor that has no memory until it is read.

    It knows its shape and dtype. Other views of the same rows, other dtypes and multiples by a number are unmade too.
    `F.cross_entropy` of them is that of a frozen head. Anything else makes the logits, once, with their gradient
    whatever mode reads them, and goes on with these. Views are then views of them, so a change in place is one of all,
    and to read some rows makes all.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    version: int
    made: Tensor | None
    uses: list[str]
    has_gradient: bool  # whether gradients were recorded where they come from
    source: tuple[LazyLogits, Callable[[Tensor], Tensor]] | None  # the logits that they are made of, and how

    @staticmethod
    def __new__(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, uses: list[str]
    ) -> LazyLogits:
        """
        Args:
            hidden: `(*, K)`, in the dtype that the product computes in.
            weight, bias: of the decoder, in any.
            dtype: of the logits.
            uses: gets the name of what reads the logits, or "loss".
        """
        shape = (*hidden.shape[:-1], weight.shape[0])
        unmade: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        unmade.hidden, unmade.weight, unmade.bias = hidden, weight, bias
        unmade.version = version_of(weight)
        unmade.made, unmade.uses = None, uses
        unmade.has_gradient, unmade.source = torch.is_grad_enabled(), None
        return unmade

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            named = () if args or "input" not in kwargs else (kwargs["input"],)
            first = next(iter((*args, *named)), None)
            if isinstance(first, LazyLogits) and not first.is_made():
                others = {name: value for name, value in kwargs.items() if not (named and name == "input")}
                found = _unmade(func, first, (*args, *named), others)
                if found is not NotImplemented:
                    return found
            name = getattr(func, "__name__", str(func))
            args, kwargs = _with_made(args, name), {key: _with_made(value, name) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise FastpeftError(
            f"{func} got logits that fuse_head has not computed, on a path that PyTorch does not report. Call "
            "outputs.logits.clone() first, or fastpeft.unfuse_head(model)."
        )

    def make(self, name: str) -> Tensor:
        """Compute the logits once. `name`: the function that asks, for the log."""
        if self.made is None:
            with (
                torch._C.DisableTorchFunctionSubclass(),
                torch.inference_mode(False),
                torch.set_grad_enabled(self.has_gradient),
                no_autocast(self.hidden.device),
            ):
                if self.source is not None:
                    logits, change = self.source
                    self.made, self.source = change(logits.make(name)), None
                else:
                    self.use(name)
                    self.made = F.linear(self.hidden, *self.operands()).to(self.dtype)
        return self.made

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the dtype that the product computes in."""
        dtype = self.hidden.dtype
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def is_made(self) -> bool:
        """Whether these logits are computed, or their source is, which may have been changed in place since."""
        return self.made is not None or (self.source is not None and self.source[0].is_made())

    def use(self, name: str) -> None:
        """Note that `name` reads hidden and weight. Raise if the weight has changed since the decoder ran."""
        if self.version != version_of(self.weight):
            raise FastpeftError(
                "logits were read after the weight of the LM head had changed; fuse_head computes them only when they "
                "are read. Read them before the change, or call fastpeft.unfuse_head(model)."
            )
        self.uses.append(name)

    def like(self, hidden: Tensor, change: Callable[[Tensor], Tensor], **changes: Any) -> LazyLogits:
        """What `change` makes of them: those of other states, or with another dtype or bias."""
        unmade = LazyLogits(
            hidden, self.weight, changes.get("bias", self.bias), changes.get("dtype", self.dtype), self.uses
        )
        unmade.version, unmade.source = self.version, (self, change)
        return unmade


def logits_in_chunks(logits: Tensor, tokens: tuple[Tensor, ...]) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """The indices of some tokens and their logits `(n, V)`, of not many at a time.

    Of logits that are not made only these are, and not kept.

    Args:
        logits: `(*, V)`.
        tokens: their indices in each dimension of `*`, as `nonzero` gives them.
    """
    size = tokens_of_chunk(logits.shape[-1], logits.device)
    chunks = zip(*(of_dimension.split(size) for of_dimension in tokens))
    if not isinstance(logits, LazyLogits) or logits.is_made():
        yield from ((chunk, logits[chunk]) for chunk in chunks)
        return
    logits.use("logits_in_chunks")
    operands = logits.operands()
    for chunk in chunks:
        with no_autocast(logits.device):
            made = F.linear(logits.hidden[chunk], *operands).to(logits.dtype)
        yield chunk, made


def _with_made(value: Any, name: str) -> Any:
    """An argument with the logits that it holds made."""
    if isinstance(value, LazyLogits):
        return value.make(name)
    if type(value) in (list, tuple):
        return type(value)(_with_made(one, name) for one in value)
    return value


def _unmade(func: Any, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` makes of `logits`, its first argument, without making them; else NotImplemented."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        return func(*args) if owner in (*_PROPERTIES, *_NO_GRADIENT) else NotImplemented
    if name in _FACTS:
        return func(*args, **kwargs)
    if func is F.cross_entropy:
        return _cross_entropy(logits, *args[1:], **kwargs)
    if name in ("view", "reshape", "flatten", "contiguous", "float", "to", "__getitem__"):
        return _view(func, name, logits, args, kwargs)
    numbers = [value for value in (*args[1:], *kwargs.values()) if type(value) in (int, float)]
    if name in ("mul", "div", "__mul__", "__rmul__", "__truediv__") and len(args) + len(kwargs) == 2 and numbers:
        factor = numbers[0] if "mul" in name else 1 / numbers[0]
        bias = None if logits.bias is None else logits.bias * factor
        return logits.like(logits.hidden * factor, _changing(func, args, kwargs), bias=bias)
    return NotImplemented


def _changing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """A call of `func` with another first argument."""
    return lambda logits: func(logits, *args[1:], **kwargs)


def _view(func: Any, name: str, logits: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The logits in another shape, of some of the rows, or in another dtype."""
    change = _changing(func, args, kwargs)
    if name in ("contiguous", "float"):
        return logits.like(logits.hidden, change, dtype=torch.float32 if name == "float" else logits.dtype)
    if name == "to":
        if "copy" in kwargs or any(type(value) is bool for value in args):
            return NotImplemented
        device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        is_here = device is None or device == logits.device
        return logits.like(logits.hidden, change, dtype=dtype or logits.dtype) if is_here else NotImplemented
    index = args[1] if name == "__getitem__" else ()
    parts = index if type(index) is tuple else (index,)
    if any(not (part is Ellipsis or isinstance(part, slice)) for part in parts):
        return NotImplemented
    if any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values())):
        return NotImplemented
    plan = torch.empty((), device="meta").expand(logits.shape)  # has no memory; what becomes of tensors of this shape
    plan = change(plan)
    width = logits.hidden.shape[-1]
    if plan.dim() == 0 or plan.shape[-1] != logits.shape[-1]:
        return NotImplemented
    hidden = logits.hidden[index] if name == "__getitem__" else logits.hidden.reshape(*plan.shape[:-1], width)
    return logits.like(hidden, change) if hidden.shape == (*plan.shape[:-1], width) else NotImplemented


def _cross_entropy(
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy` where it is that of classes, all alike; what else it can do needs the logits."""
    is_plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    fits = logits.dim() == 2 and target.shape == logits.shape[:1] and target.device == logits.device
    if not (is_plain and fits and target.dtype == torch.int64 and reduction in ("mean", "sum", "none")):
        return NotImplemented
    logits.use("loss")
    with no_autocast(logits.device):
        decoder = logits.weight.to(logits.hidden.dtype)
        return loss_of_head(logits.hidden, decoder, target, logits.bias, ignore_index, reduction)


class FusedLinear(nn.Linear):
    """What `fuse_head` makes of a decoder, by a change of its class: everything else stays as it is.

    Attributes:
        is_labelled: whether the model that runs now was given labels.
        is_asked: whether nobody may want all logits without labels either, see `making_no_logits`.
        is_told: whether the log has said that logits are made.
        uses: what was done with the last logits.
        handles: of the hooks on the model.
    """

    is_labelled: bool
    is_asked: bool
    is_told: bool
    uses: list[str]
    handles: list[RemovableHandle]

    def forward(self, input: Tensor) -> Tensor:
        trains = any(parameter.requires_grad for parameter in self.parameters()) and torch.is_grad_enabled()
        is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        is_hooked = self._forward_hooks or self._forward_pre_hooks  # which may lend other weights, or read the logits
        dtype = compute_dtype(input, self.weight)
        castable = dtype is input.dtype or autocast_dtype(input.device) is not None
        if not (self.is_labelled or self.is_asked) or trains or is_traced or is_hooked or not castable:
            return super().forward(input)
        return LazyLogits(input.to(dtype), self.weight, self.bias, dtype, self.uses)


def _before(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    decoder = _decoder(model)
    if isinstance(decoder, FusedLinear):
        decoder.is_labelled, decoder.uses = kwargs.get("labels") is not None, []


def _after(model: nn.Module, args: Any, output: Any) -> None:
    decoder = _decoder(model)
    if isinstance(decoder, FusedLinear):
        decoder.is_labelled = False
        reads = [use for use in decoder.uses if use != "loss"]
        if reads and not decoder.is_told:
            decoder.is_told = True
            logger.warning(
                "%s reads its logits by %s, so they are computed: fastpeft.fuse_head saves nothing here.",
                type(model).__name__,
                reads[0],
            )


def _decoder(model: nn.Module) -> Any:
    """A model's LM head; None if it has none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _decoders(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each decoder with the innermost model that calls it its own."""
    seen = set()
    for module in reversed(list(model.modules())):
        decoder = _decoder(module) if isinstance(module, PreTrainedModel) else None
        if isinstance(decoder, nn.Module) and decoder not in seen:
            seen.add(decoder)
            yield module, decoder


def fuse_any_head(model: nn.Module) -> None:
    """`fuse_head` of a model that it takes; any other stays as it is."""
    if any(type(decoder) in (nn.Linear, PackedLinear, FusedLinear) for _, decoder in _decoders(model)):
        fuse_head(model)


@contextmanager
def making_no_logits(model: nn.Module) -> Iterator[None]:
    """Let a model whose head can be fused answer with `LazyLogits` without labels too; its head stays fused."""
    fuse_any_head(model)
    heads = [module for module in model.modules() if isinstance(module, FusedLinear)]
    for head in heads:
        head.is_asked = True
    try:
        yield
    finally:
        for head in heads:
            head.is_asked = False


Model = TypeVar("Model", bound=nn.Module)


def fuse_head(model: Model) -> Model:
    """Let a language model compute its loss without making its logits, while its LM head does not train.

    Args:
        model: a transformers model with an LM head, causal, masked or behind an encoder, or a module that holds
            one, such as PEFT's wrapper. The decoder, an `nn.Linear`, changes its class, in place, and its model gets
            two hooks.

    Returns:
        The model. Given `labels`, its loss is `functional.frozen_head_cross_entropy`, in float32. The `logits` of its
        output are a tensor that makes itself when it is read. Without labels, and while the decoder trains, it computes
        as before.

    Raises:
        FastpeftError: the model has no LM head, or one that is no `nn.Linear`, as a quantised or adapted one.

    Notes:
        The model computes its own loss: shifted labels, `num_items_in_batch` and ignored tokens are its own. Where it
        changes logits by more than a factor before, or the loss has weights or smooths labels, they are made as before,
        and the log says so. A second derivative is refused. Under `torch.compile` logits are made. Trainer's evaluation
        with `compute_metrics` reads the logits; without it, they are not made.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=100, **sizes)).requires_grad_(False)
        >>> ids = torch.randint(100, (2, 7))
        >>> fuse_head(model)(input_ids=ids, labels=ids).loss.shape
        torch.Size([])
    """
    unfuse_head(model)
    found = list(_decoders(model))
    fusable = [pair for pair in found if type(pair[1]) in (nn.Linear, PackedLinear)]
    if not fusable:
        what = f"is a {type(found[0][1]).__name__}" if found else "is not there"
        raise FastpeftError(
            f"fuse_head: the LM head of the {type(model).__name__} {what}; it must be an nn.Linear, which no "
            "adapter or quantisation has replaced. Leave fuse_head out."
        )
    for owner, decoder in fusable:
        unpack_frozen(decoder)
        handles = [
            owner.register_forward_pre_hook(_before, with_kwargs=True),
            owner.register_forward_hook(_after, always_call=True),
        ]
        decoder.__dict__.update(is_labelled=False, is_asked=False, is_told=False, uses=[], handles=handles)
        decoder.__class__ = FusedLinear
    return model


def unfuse_head(model: Model) -> Model:
    """Undo `fuse_head`."""
    for decoder in model.modules():
        if isinstance(decoder, FusedLinear):
            for handle in decoder.handles:
                handle.remove()
            for name in ("is_labelled", "is_asked", "is_told", "uses", "handles"):
                del decoder.__dict__[name]
            decoder.__class__ = nn.Linear  # type: ignore[assignment]
    return model
