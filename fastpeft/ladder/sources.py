"""Where the side network's features come from, and when it runs: one `LadderPass` around each pass of the base.

| source             | the backbone's layers | the side network                                  |
|--------------------|-----------------------|---------------------------------------------------|
| `RunningBackbone`  | run                   | reads each feature when its layer has made it     |
| `GivenFeatures`    | are skipped           | reads all features before the base runs           |
| `GivenOutput`      | are skipped           | does not run: what it would return is there       |

In each case the base then computes its head on the side network's output. Cached features are `GivenFeatures`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.cache import FeatureCache
from fastpeft.ladder.passes import autocast_of, listen, skip_layers, tokens_of
from fastpeft.ladder.side import SideRun


class FeatureSource(Protocol):
    """Where the features of a pass come from."""

    def around_base(self, ladder: LadderPass) -> contextlib.AbstractContextManager[None]:
        """The context in which a pass of the base has the side network's output in place of its encoder's."""


class RunningBackbone:
    """The layers, as they run: each feature is handed over, and the last one replaced."""

    def around_base(self, ladder: LadderPass) -> contextlib.AbstractContextManager[None]:
        return listen(ladder.backbone, ladder.feed, ladder.output, tokens_of(ladder.arguments))


class GivenFeatures:
    """The features `B_0 .. B_L`, each `(B, T, d)`, from a cache or from one pass that many side networks share."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        self._features = features

    @contextlib.contextmanager
    def around_base(self, ladder: LadderPass) -> Iterator[None]:
        for layer, feature in enumerate(self._features):
            ladder.feed(layer, feature)
        with skip_layers(ladder.backbone, ladder.output(self._features[-1])):
            yield


class GivenOutput:
    """The side network's output, `(B, T, d)`, that a pool has computed for many tasks at once."""

    def __init__(self, output: Tensor) -> None:
        self._output = output

    @contextlib.contextmanager
    def around_base(self, ladder: LadderPass) -> Iterator[None]:
        ladder.begin_head(self._output)
        with skip_layers(ladder.backbone, self._output):
            yield


def choose_source(cache: FeatureCache | None, arguments: Mapping[str, Any]) -> FeatureSource:
    """The source for a pass: the cache, if there is one and it can know the rows; else the running backbone."""
    features = None if cache is None else cache.features(arguments)
    return RunningBackbone() if features is None else GivenFeatures(features)


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
    def around_base(self, source: FeatureSource) -> Iterator[None]:
        """While the block runs, a pass of the base computes its head on the side network's output."""
        with self._head:
            try:
                # not a context: it ends inside a layer, and torch.compile follows a plain call into layers
                torch.set_grad_enabled(self._gradients and self._gradients_from == 0)
                self._head.enter_context(source.around_base(self))
                yield
            finally:
                self._end_frozen()

    def feed(self, layer: int, feature: Tensor) -> None:
        """Let the side network read `B_layer`."""
        if layer == 0:
            batch, tokens = feature.shape[:2]
            check_mask(self._run.mask, (batch, self._run.past + tokens))
        if not self._gradients:
            self._give(layer, feature)
            return
        if layer < self._gradients_from:
            feature = feature.detach()
        with torch.enable_grad():
            self._give(layer, feature)
        if layer == self._gradients_from - 1:
            self._end_frozen()

    def _give(self, layer: int, feature: Tensor) -> None:
        if self.backbone.plain:
            feature = feature.clone()  # an activation in place may follow
        self._run.feed(layer, feature.to(self._device))

    def output(self, last_feature: Tensor) -> Tensor:
        """The side network's output in place of `B_L`, in its dtype and on its device. From here on the head runs."""
        self.begin_head(last_feature)
        return self._run.output().to(last_feature)

    def _end_frozen(self) -> None:
        """What runs from here on may have gradients."""
        torch.set_grad_enabled(self._gradients)

    def begin_head(self, hidden: Tensor) -> None:
        """What runs from here on is the head: with gradients, and in float32 on `hidden` by autocast."""
        self._end_frozen()
        if (autocast := autocast_of(hidden)) is not None:
            self._head.enter_context(autocast)


def check_mask(attention_mask: Tensor | None, tokens: tuple[int, int]) -> None:
    """Raise `FastpeftError` if there is a mask of another shape than `(B, T)`, where T counts cached tokens too."""
    if attention_mask is not None and attention_mask.shape != tokens:
        raise FastpeftError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; the side network takes (B, T), here "
            f"{tuple(tokens)}, with 1 for tokens and 0 for padding; cached tokens count too."
        )


def check_attentions(asked: bool | None) -> None:
    """Raise `FastpeftError` if the probabilities of attentions are asked for."""
    if asked:
        raise FastpeftError(
            "output_attentions=True, but a side network keeps no probabilities of its attention. Leave it out; the "
            "base alone returns those of its own."
        )


def check_positions(position_ids: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise `FastpeftError` where positions do not follow each other and there is no mask: texts that were joined.

    Transformers takes such rows for joined texts, which a causal backbone keeps apart. The side network, whose masks
    are of tokens alone, would not. What `torch.compile` traces is not checked.
    """
    if position_ids is None or attention_mask is not None or torch.compiler.is_compiling():
        return
    if (position_ids.diff(dim=-1) != 1).any():
        raise FastpeftError(
            "position_ids begin anew within a row, or leave some out, and there is no attention_mask: these are joined "
            "texts, which a side network cannot tell apart. Give each a row of its own (packing=False), or an "
            "attention_mask to rows of one text."
        )
