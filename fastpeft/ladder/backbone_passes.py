"""Passes of a backbone whose layers are listened to, replaced or compiled."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ops.dtypes import HALVES, autocast_dtype

_ADVICE_FOR_TEXT = (
    "Load the base with attn_implementation='sdpa', which keeps padding, without virtual tokens, and name in "
    "feature_modules only layers of the backbone's width. A model that pads rows itself, as Longformer does, takes "
    "those of a data collator with pad_to_multiple_of its number. One that puts the patches of an image beside a text, "
    "as LayoutLMv3 does, takes the text alone: leave pixel_values out."
)
_ADVICE = (
    "Name in feature_modules layers between which the number of tokens stays the same (H W for (B, C, H, W)), and give "
    "the widths that were not found in feature_sizes."
)

_STARTING = threading.Lock()


class IdleLayersError(FastpeftError):
    """A pass of a backbone left out layers that are to be listened to."""


@contextlib.contextmanager
def listen(
    backbone: Backbone,
    feed: Callable[[int, Tensor], None],
    replace: Callable[[Tensor], Tensor] = lambda feature: feature,
    tokens: tuple[int, ...] | None = None,
    rows: int | None = None,
) -> Iterator[None]:
    """While the block runs, hand each feature to `feed`, and let `replace` change the output of the last layer.

    Both see features as `(B, T, d)`: a `(B, d)` is one token, and a `(B, d, H, W)` of a convolution is H W tokens.
    A pooler, which comes after the layers, trains in float32: after layers in half precision it runs under autocast.

    Args:
        backbone: the model, which the block calls.
        feed: called as `feed(layer, feature)`, layer 0 to L.
        replace: called with `B_L` after `feed`; its result goes on to the head.
        tokens: B and T of all features; None takes them from the first feature.
        rows: B, where it tells features `(T, B, d)`; None does not look.

    Raises:
        FastpeftError: in the block, if a feature has another shape.
        IdleLayersError: after the block, if a layer did not run.
    """
    ran: set[int] = set()

    def take(layer: int, feature: Any) -> Tensor:
        nonlocal tokens
        ran.add(layer)
        found = _as_tokens(feature, layer)
        if feature.ndim == 3 and rows is not None and not backbone.rows_first:
            _check_rows_first(backbone, layer, feature, rows)
        tokens = found.shape[:2] if tokens is None else tokens
        expected = (*tokens, backbone.feature_sizes[layer])
        if found.shape != expected:
            read = f", read from {tuple(feature.shape)} as (B, C, H, W)" if feature.ndim == 4 else ""
            raise FastpeftError(
                f"the feature of layer {layer} has the shape {tuple(found.shape)}{read}; it must be (B, T, d), here "
                f"{expected}. {_ADVICE_FOR_TEXT if backbone.input_name == 'input_ids' else _ADVICE}"
            )
        feed(layer, found)
        return found

    def heard(index: int, computed: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index == 1:
                take(0, args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))
            output = _as_tuple(computed(*args, **kwargs))
            feature = output[0] if isinstance(output, tuple) else output
            found = take(index, feature)
            if index < len(backbone.layers):
                return output
            replaced = _from_tokens(replace(found), feature.shape)
            if (autocast := autocast_of(replaced)) is not None:
                after_layers.enter_context(autocast)
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        return forward

    after_layers = contextlib.ExitStack()
    with after_layers, _forwards(backbone, heard):
        yield
    # else the base's own output would be returned as if a side network had made it
    if idle := [layer for layer in range(1, len(backbone.layers) + 1) if layer not in ran]:
        raise IdleLayersError(_did_not_run(backbone, idle))


def _check_rows_first(backbone: Backbone, layer: int, feature: Tensor, rows: int) -> None:
    """Raise `FastpeftError` if a feature is `(T, B, d)`; once a shape shows that none is, no more are looked at."""
    if feature.shape[0] != rows == feature.shape[1]:
        raise FastpeftError(
            f"the feature of layer {layer} has the shape {tuple(feature.shape)} in a pass over {rows} rows: it is "
            "(T, B, d), and a side network reads (B, T, d): it would mix the rows up. Make layers that take rows "
            "first, as those of torch do with batch_first=True."
        )
    if feature.shape[1] != rows and not torch.compiler.is_compiling():
        backbone.rows_first = True


@contextlib.contextmanager
def skip_layers(backbone: Backbone, output: Tensor, given: Mapping[str, Any]) -> Iterator[None]:
    """While the block runs, the layers compute nothing and the output of the last one is `output`, `(B, T, d)`.

    A pass of the model then computes its embeddings and its head. In the first such pass the first layer runs too, to
    learn whether layers return a tensor or a tuple.

    Args:
        backbone: the model, which the block calls.
        output: the output of the last layer.
        given: the inputs that `output` was made of.

    Raises:
        FastpeftError: the model is not a transformers model, so what runs between its layers is not known; or in the
            block, its head gives the layers other inputs.
    """
    if backbone.plain:
        raise FastpeftError(
            f"only a transformers model can run without its layers; the base is a {backbone.class_name}. "
            "Give it a LadderModel of its own, without a cache."
        )

    def skipped(index: int, computed: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if backbone.tuple_size is None:
                with torch.no_grad():
                    returned = _as_tuple(computed(*args, **kwargs))
                backbone.tuple_size = len(returned) if isinstance(returned, tuple) else 0
            hidden = output if index == len(backbone.layers) else args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (backbone.tuple_size - 1)) if backbone.tuple_size else hidden

        return forward

    def check_inputs(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        own = [name for name in tensors if name not in given and name != "position_ids"]  # those of a context's texts
        if of_encoder:  # whose features know nothing of the decoder
            own = [name for name in own if not name.startswith("decoder_")]
        if own:
            raise FastpeftError(
                f"the head of the {backbone.class_name} makes {', '.join(own)} for its layers, of which "
                f"features that were kept or computed without the head know nothing. Give {own[0]} in the batch, or "
                "use a LadderModel of its own without `cache_features`."
            )

    of_encoder = backbone.encoder is not None
    hook = backbone.body.register_forward_pre_hook(check_inputs, with_kwargs=True)
    try:
        with _forwards(backbone, skipped):
            yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _forwards(backbone: Backbone, around: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """While the block runs, layer i, from 1, has the forward `around(i, its own)`, which torch.compile traces.

    Raises:
        FastpeftError: another pass runs meanwhile, whose forwards would stay.
    """
    compiling = torch.compiler.is_compiling()
    with contextlib.nullcontext() if compiling else _STARTING:
        before = [layer.forward for layer in backbone.layers]
        if not compiling and inspect.isfunction(before[0]) and before[0].__module__ == __name__:
            raise FastpeftError(
                "another thread runs this model. A LadderModel, or a member that is called by itself, answers one call "
                "at a time: give threads a lock, or call a LadderPool, of which a base has one."
            )
        own = [compiling or "forward" in vars(layer) for layer in backbone.layers]
        for index, layer in enumerate(backbone.layers, 1):
            layer.forward = around(index, before[index - 1])
    try:
        yield
    finally:
        for layer, forward, keeps in zip(backbone.layers, before, own):
            layer.forward = forward
            if not keeps:  # its class has it
                del layer.forward


def run_body(
    backbone: Backbone,
    given: Mapping[str, Any],
    feed: Callable[[int, Tensor], None],
    replace: Callable[[Tensor], Tensor] = lambda feature: feature,
) -> None:
    """A pass over text without the head, or of an encoder without its decoder; `feed` and `replace` as in `listen`.

    Raises:
        FastpeftError: the layers are those of a decoder whose tokens the head makes.
    """
    inputs, encoder = backbone.after_context(backbone.inputs(given)), backbone.encoder
    with listen(backbone, feed, replace, tokens_of(given)):
        if encoder is not None:
            encoder(**inputs)
            return
        try:
            backbone.body(**inputs)
        except ValueError as error:
            if isinstance(error, FastpeftError) or backbone.plain or not backbone.encodes_and_decodes:
                raise
            raise FastpeftError(
                f"the head of the {backbone.class_name} makes the tokens of its decoder, whose layers the "
                "side network reads, so their features cannot be cached or shared in a pool. Name the encoder's layers "
                "in feature_modules, or use a LadderModel of its own without `cache_features`."
            ) from error


def features_of(backbone: Backbone, given: Mapping[str, Any]) -> list[Tensor]:
    """The features `B_0 .. B_L` of text, each `(B, T, d)`."""
    kept: list[Tensor] = []
    run_body(backbone, given, lambda _, feature: kept.append(feature))
    if len(kept) != len(backbone.layers) + 1:
        raise FastpeftError(
            f"a pass made {len(kept)} features of {len(backbone.layers) + 1}. Name in feature_modules layers that run "
            "once each."
        )
    return kept


def compile_layers(backbone: Backbone, options: Mapping[str, Any]) -> None:
    """Compile each layer, with options of `torch.compile`. Hooks on a layer stay outside of what is compiled."""
    for layer in backbone.layers:
        layer.forward = _CompiledForward(layer, options)


class _CompiledForward:
    """The forward of a layer, compiled at its first call. A copy of the model compiles again, for its own layer."""

    def __init__(self, layer: nn.Module, options: Mapping[str, Any]) -> None:
        own = vars(layer).get("forward")
        self._forward: Any = own._forward if isinstance(own, _CompiledForward) else layer.forward
        self._options = options
        self._compiled: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self._forward, **self._options)
        return self._compiled(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}


def tokens_of(given: Mapping[str, Any]) -> torch.Size | None:
    """B and T of text; None for other inputs."""
    source: Tensor | None = given.get("input_ids", given.get("inputs_embeds"))
    return None if source is None else source.shape[:2]


def rows_of(given: Mapping[str, Any]) -> int | None:
    """How many rows a module that is not a transformers model is given; None for other inputs."""
    inputs = given.get("inputs")
    return len(inputs) if isinstance(inputs, Tensor) and inputs.ndim > 0 else None


def autocast_of(feature: Tensor) -> contextlib.AbstractContextManager[Any] | None:
    """The context for float32 modules that read `feature`: autocast to its dtype if that has 16 bits and none is on."""
    if feature.dtype in HALVES and not feature.is_meta and autocast_dtype(feature.device) is None:
        return torch.autocast(feature.device.type, feature.dtype)
    return None


def _did_not_run(backbone: Backbone, idle: list[int]) -> str:
    """What is wrong where a pass left out the layers of these numbers, from 1."""
    names = {module: name for name, module in backbone.core.named_modules()}
    first, last, count = (names.get(backbone.layers[idle[0] - 1]), names.get(backbone.layers[idle[-1] - 1]), len(idle))
    return (
        f"a pass of the {backbone.class_name} did not run {count} of the {len(backbone.layers)} layers that "
        f"the side network reads ({first}{f' to {last}' if count > 1 else ''}), so it would change nothing. Name in "
        "feature_modules layers that run in every pass, in their order: single modules of model.named_modules(), or "
        "a list that the model runs one module after the other."
    )


def _as_tuple(output: Any) -> Any:
    """What a layer returned, a tuple in place of a list of one feature, as OpenAI's first GPT has it."""
    return tuple(output) if isinstance(output, list) and len(output) == 1 else output


def _as_tokens(feature: Any, layer: int) -> Tensor:
    """A feature as `(B, T, d)`; see `listen`."""
    if isinstance(feature, Tensor) and feature.is_nested:
        raise FastpeftError(
            f"the feature of layer {layer} is a nested tensor, whose rows have no padding; a side network reads "
            "(B, T, d). Make torch's nn.TransformerEncoder with enable_nested_tensor=False, or set its "
            "use_nested_tensor to False."
        )
    if isinstance(feature, Tensor) and feature.is_floating_point():
        if feature.ndim == 2:
            return feature[:, None]
        if feature.ndim == 3:
            return feature
        if feature.ndim == 4:
            return feature.flatten(2).mT
    found = f"{feature.dtype} {tuple(feature.shape)}" if isinstance(feature, Tensor) else type(feature).__name__
    raise FastpeftError(
        f"the feature of layer {layer} is {found.removeprefix('torch.')}; allowed are floating-point (B, T, d), (B, d) "
        "and (B, C, H, W). Name in feature_modules layers whose input and output have one of these shapes."
    )


def _from_tokens(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_as_tokens`, for a feature that had `shape`."""
    if len(shape) == 2:
        return tokens[:, 0]
    return tokens if len(shape) == 3 else tokens.mT.reshape(shape)
