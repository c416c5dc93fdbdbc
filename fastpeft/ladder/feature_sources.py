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

from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.backbone_passes import autocast_of, listen, rows_of, skip_layers, tokens_of
from fastpeft.ladder.cache import FeatureCache
from fastpeft.ladder.checks import check_mask
from fastpeft.ladder.side import SideRun


class FeatureSource(Protocol):
    """Where the features of a pass come from."""

    def around_base(self, ladder: LadderPass) -> contextlib.AbstractContextManager[None]:
        """The context in which a pass of the base has the side network's output in place of its encoder's."""


class RunningBackbone:
    """The layers, as they run: each feature is handed over, and the last one replaced."""

    def around_base(self, ladder: LadderPass) -> contextlib.AbstractContextManager[None]:
        given = ladder.arguments
        return listen(ladder.backbone, ladder.feed, ladder.output, tokens_of(given), rows_of(given))


class GivenFeatures:
    """The features `B_0 .. B_L`, each `(B, T, d)`, from a cache or from one pass that many side networks share."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        self._features = features

    @contextlib.contextmanager
    def around_base(self, ladder: LadderPass) -> Iterator[None]:
        for layer, feature in enumerate(self._features):
            ladder.feed(layer, feature)
        with skip_layers(ladder.backbone, ladder.output(self._features[-1]), ladder.arguments):
            yield


class GivenOutput:
    """The side network's output, `(B, T, d)`, that a pool has computed for many tasks at once."""

    def __init__(self, output: Tensor) -> None:
        self._output = output

    @contextlib.contextmanager
    def around_base(self, ladder: LadderPass) -> Iterator[None]:
        ladder.begin_head(self._output)
        with skip_layers(ladder.backbone, self._output, ladder.arguments):
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

    Attributes:
        read: B and T of the features, once the side network reads them.
    """

    def __init__(self, backbone: Backbone, run: SideRun, arguments: Mapping[str, Any], gradients_from: int) -> None:
        self.backbone, self.arguments = backbone, arguments
        self.read: tuple[int, int] | None = None
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
            batch, tokens = self.read = feature.shape[0], feature.shape[1]
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
