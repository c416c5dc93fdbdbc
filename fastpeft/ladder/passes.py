"""Passes of a frozen backbone with a side network in place of its last output; what they know of it beforehand decides.

| known before                                  | the backbone's layers | the side network                            |
|-----------------------------------------------|-----------------------|---------------------------------------------|
| nothing                                       | run                   | reads each feature when its layer made it   |
| all features, of a cache or a pool            | are skipped           | reads them before the base runs             |
| the side network's output, which a pool made  | are skipped           | does not run                                |

In each case the base then computes its head on the side network's output.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.inputs import check_mask, tokens_of
from fastpeft.ladder.side import SideRun
from fastpeft.ops.dtypes import HALVES, autocast_dtype

Known: TypeAlias = Sequence[Tensor] | Tensor | None  # the features `B_0 .. B_L`, or the output, each `(B, T, d)`

_ADVICE = (
    "Load the base with attn_implementation='sdpa', which keeps padding, without virtual tokens, and name in "
    "feature_modules only layers of one width and number of tokens. A model that pads rows itself takes those of a "
    "data collator with pad_to_multiple_of its number. One that puts the patches of an image beside a text takes the "
    "text alone: leave pixel_values out."
)

_STARTING = threading.Lock()
_RUNNING: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the first layer of each backbone in a pass


class IdleLayersError(FastpeftError):
    """A pass of a backbone left out layers that are to be listened to."""


# -- features ----------------------------------------------------------------------------------------------------


class FeatureHooks:
    """Hooks on the layers of a backbone, which give what they read and make to the pass that listens, if one does.

    They stay while the backbone exists: `torch.compile` traces hooks that are there, and not how one is registered.

    Attributes:
        layers: those of the backbone.
        before: of the pass, called with the arguments of the first layer.
        after: of the pass, called with the number of a layer, from 1, and its output; returns what replaces that.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.layers = backbone.layers
        self.before: Callable[[tuple[Any, ...], Mapping[str, Any]], None] | None = None
        self.after: Callable[[int, Any], Any] | None = None
        handles = [self.layers[0].register_forward_pre_hook(self._before, with_kwargs=True)]
        for index, layer in enumerate(self.layers, 1):
            handles.append(layer.register_forward_hook(partial(self._after, index)))
        weakref.finalize(backbone, _remove, handles)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.before is not None:
            self.before(args, kwargs)

    def _after(self, index: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if self.after is None else self.after(index, output)


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def hooks_of(backbone: Backbone) -> FeatureHooks:
    """The hooks on the layers that a backbone has now."""
    hooks: FeatureHooks | None = backbone.hooks
    if hooks is None or hooks.layers is not backbone.layers:
        hooks = backbone.hooks = FeatureHooks(backbone)
    return hooks


@contextlib.contextmanager
def listen(
    backbone: Backbone,
    feed: Callable[[int, Tensor], None],
    replace: Callable[[Tensor], Tensor] = lambda feature: feature,
    tokens: tuple[int, ...] | None = None,
) -> Iterator[None]:
    """While the block runs, hand each feature to `feed`, and let `replace` change the output of the last layer.

    A pooler, which comes after the layers, trains in float32: after layers in half precision it runs under autocast.

    Args:
        backbone: the model, which the block calls.
        feed: called as `feed(layer, feature)`, layer 0 to L.
        replace: called with `B_L` after `feed`; its result goes on to the head.
        tokens: B and T of all features; None takes them from the first feature.

    Raises:
        FastpeftError: in the block, if a feature has another shape.
        IdleLayersError: after the block, if a layer did not run.
    """
    ran: set[int] = set()

    def read(layer: int, feature: Any) -> Tensor:
        nonlocal tokens
        ran.add(layer)
        is_feature = isinstance(feature, Tensor) and feature.is_floating_point()
        if tokens is None and is_feature:
            tokens = feature.shape[:2]
        expected = (*(tokens or ("B", "T")), backbone.hidden_size)
        if not is_feature or feature.shape != expected:
            found = f"{feature.dtype} {tuple(feature.shape)}" if isinstance(feature, Tensor) else type(feature).__name__
            raise FastpeftError(
                f"the feature of layer {layer} is {found.removeprefix('torch.')}; it must be floating-point (B, T, d), "
                f"here {expected}. {_ADVICE}"
            )
        feed(layer, feature)
        return feature

    def before(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        read(0, args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))

    def after(index: int, output: Any) -> Any:
        several = isinstance(output, tuple | list)
        feature = output[0] if several else output
        found = read(index, feature)
        if index < len(backbone.layers):
            return None
        replaced = replace(found)
        if (autocast := autocast_of(replaced)) is not None:
            after_layers.enter_context(autocast)
        return (replaced, *output[1:]) if several else replaced

    hooks = hooks_of(backbone)
    after_layers = contextlib.ExitStack()
    with _only_pass(backbone), after_layers:
        hooks.before, hooks.after = before, after
        try:
            yield
        finally:
            hooks.before = hooks.after = None
    # else the base's own output would be returned as if a side network had made it
    if idle := [layer for layer in range(1, len(backbone.layers) + 1) if layer not in ran]:
        raise IdleLayersError(_did_not_run(backbone, idle))


@contextlib.contextmanager
def _only_pass(backbone: Backbone) -> Iterator[None]:
    """While the block runs, no other pass of these layers begins, which would read and replace the same outputs."""
    if torch.compiler.is_compiling():
        yield
        return
    first = backbone.layers[0]
    with _STARTING:
        if first in _RUNNING:
            raise FastpeftError(
                "another thread runs this model. A LadderModel, or a member that is called by itself, answers one call "
                "at a time: give threads a lock, or call a LadderPool, of which a base has one."
            )
        _RUNNING.add(first)
    try:
        yield
    finally:
        _RUNNING.discard(first)


@contextlib.contextmanager
def skip_layers(backbone: Backbone, output: Tensor, given: Mapping[str, Any]) -> Iterator[None]:
    """While the block runs, the layers compute nothing and the output of the last one is `output`, `(B, T, d)`.

    A pass of the model then computes its embeddings and its head. No hook keeps a layer from running, so the layers
    have another `forward` for that long. In the first such pass the first layer runs too, to learn whether layers
    return a tensor or a tuple.

    Args:
        backbone: the model, which the block calls.
        output: the output of the last layer.
        given: the inputs that `output` was made of.

    Raises:
        FastpeftError: in the block, its head gives the layers other inputs.
    """

    def skipped(index: int, computed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if backbone.tuple_size is None:
            with torch.no_grad():
                returned = computed(*args, **kwargs)
            backbone.tuple_size = len(returned) if isinstance(returned, tuple | list) else 0
        hidden = output if index == len(backbone.layers) else args[0] if args else kwargs["hidden_states"]
        return (hidden, *[None] * (backbone.tuple_size - 1)) if backbone.tuple_size else hidden

    def check_inputs(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
        own = [name for name in tensors if name not in given and name != "position_ids"]  # those of a context's texts
        if backbone.encoder is not None:  # whose features know nothing of the decoder
            own = [name for name in own if not name.startswith("decoder_")]
        if own:
            raise FastpeftError(
                f"the head of the {backbone.class_name} makes {', '.join(own)} for its layers, of which "
                f"features that were kept or computed without the head know nothing. Give {own[0]} in the batch, or "
                "use a LadderModel of its own without `cache_features`."
            )

    hook = backbone.body.register_forward_pre_hook(check_inputs, with_kwargs=True)
    with _only_pass(backbone):
        before = [vars(layer).get("forward") for layer in backbone.layers]
        try:
            for index, layer in enumerate(backbone.layers, 1):
                layer.forward = partial(skipped, index, layer.forward)
            yield
        finally:
            hook.remove()
            for layer, forward in zip(backbone.layers, before):
                del layer.forward
                if forward is not None:  # of the layer itself, not of its class
                    layer.forward = forward


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
            if isinstance(error, FastpeftError) or not backbone.encodes_and_decodes:
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


# -- one pass with a side network --------------------------------------------------------------------------------


class LadderPass:
    """One pass of a base with a side network in place of its encoder's output. Only this class calls the side network.

    Args:
        backbone: the base, taken apart.
        run: the pass of the side network.
        arguments: what the base is called with.
        gradients_from: the first layer through which gradients flow, L + 1 for none: an adapter in it trains. The
            layers before it run without gradients.
    """

    def __init__(self, backbone: Backbone, run: SideRun, arguments: Mapping[str, Any], gradients_from: int) -> None:
        self.backbone, self.arguments = backbone, arguments
        self._run, self._gradients_from = run, gradients_from
        self._gradients = torch.is_grad_enabled()
        self._device = run.side.up.weight.device  # perhaps not that of the backbone
        self._head = contextlib.ExitStack()  # what the head runs under

    @contextlib.contextmanager
    def around_base(self, known: Known = None) -> Iterator[None]:
        """While the block runs, a pass of the base computes its head on the side network's output."""
        with self._head:
            try:
                # not a context: it ends inside a layer, and torch.compile follows a plain call into layers
                torch.set_grad_enabled(self._gradients and self._gradients_from == 0)
                self._head.enter_context(self._layers(known))
                yield
            finally:
                torch.set_grad_enabled(self._gradients)

    def _layers(self, known: Known) -> contextlib.AbstractContextManager[None]:
        """What the layers do in the pass of the base."""
        given = self.arguments
        if known is None:
            return listen(self.backbone, self._feed, self._output, tokens_of(given))
        if isinstance(known, Tensor):
            self._begin_head(known)
            return skip_layers(self.backbone, known, given)
        for layer, feature in enumerate(known):
            self._feed(layer, feature)
        return skip_layers(self.backbone, self._output(known[-1]), given)

    def _feed(self, layer: int, feature: Tensor) -> None:
        """Let the side network read `B_layer`."""
        if layer == 0:
            check_mask(self._run.mask, (feature.shape[0], self._run.past + feature.shape[1]))
        if not self._gradients:
            self._give(layer, feature)
            return
        if layer < self._gradients_from:
            feature = feature.detach()
        with torch.enable_grad():
            self._give(layer, feature)
        if layer == self._gradients_from - 1:
            torch.set_grad_enabled(self._gradients)

    def _give(self, layer: int, feature: Tensor) -> None:
        self._run.feed(layer, feature.to(self._device))

    def _output(self, last_feature: Tensor) -> Tensor:
        """The side network's output in place of `B_L`, in its dtype and on its device. From here on the head runs."""
        self._begin_head(last_feature)
        return self._run.output().to(last_feature)

    def _begin_head(self, hidden: Tensor) -> None:
        """What runs from here on is the head: with gradients, and in float32 on `hidden` by autocast."""
        torch.set_grad_enabled(self._gradients)
        if (autocast := autocast_of(hidden)) is not None:
            self._head.enter_context(autocast)


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
