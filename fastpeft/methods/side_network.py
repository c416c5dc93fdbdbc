"""Methods that train a side network beside the model, and save that alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from fastpeft.errors import FastpeftError, refuse
from fastpeft.methods.method import EarlierRun, Method, name_after
from fastpeft.methods.preparation import ALL_LINEAR, Preparation
from fastpeft.support.model_card import loading_snippet

SIVA_LAYERS = "siva_layers"  # the setting of a side network beside which SiVA trains
OF_SIVA = ("targets", "rank")  # options of what trains there
EXAMPLES = "examples"  # that of one whose decoder reads some training rows in front of every text
GATED: Mapping[str, Any] = {"window_size": 1, "fusion": "gated"}  # the original LST

# arguments of a LadderConfig that follow from the model or the data, or have an option of their own
_NOT_SETTINGS = (
    *("causal", "context", "train_adapters", "kwargs", "return"),
    *("window_size", "reduction_factor", "pack_weights"),
)


@dataclass(frozen=True, kw_only=True)
class SideNetworkMethod(Method):
    """A method that saves a side network.

    Attributes:
        fields: what its configuration is given before a person's options and settings.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ("window", "reduction", *OF_SIVA)

    frozen_features = True
    saves_model = False

    def config_fields(self) -> dict[str, Any]:
        from fastpeft.ladder import LadderConfig

        hints = get_type_hints(LadderConfig.__init__)
        own = {name: hint for name, hint in hints.items() if not name.startswith("base_") and name not in _NOT_SETTINGS}
        return {**own, SIVA_LAYERS: int, EXAMPLES: int}

    def check(self, preparation: Preparation) -> None:
        self._config(preparation)
        given = [name for name in OF_SIVA if getattr(preparation, name) is not None]
        count, targets = preparation.settings.get(EXAMPLES), preparation.targets
        conflicts = {
            f"`{''.join(given[:1])}` is of SiVA, which trains beside a side network only where {SIVA_LAYERS} says in "
            f"how many of the last layers. Give {SIVA_LAYERS} too, or leave `{''.join(given[:1])}` out.": (
                given and SIVA_LAYERS not in preparation.settings
            ),
            f"`targets` is {targets!r} beside {SIVA_LAYERS}, which chooses among the layers itself. Give names joined "
            f"by commas, or {ALL_LINEAR}.": isinstance(targets, str) and targets != ALL_LINEAR,
            f"{EXAMPLES} is {count}; it must be a whole number from 1. Or leave it out.": (
                count is not None and count < 1
            ),
        }
        refuse(conflicts)

    def examples(self, preparation: Preparation) -> int:
        count: int = preparation.settings.get(EXAMPLES, 0)
        return count

    def _config(self, preparation: Preparation) -> Any:
        from fastpeft.ladder import LadderConfig

        given = {"window_size": preparation.window, "reduction_factor": preparation.reduction}
        given = {name: value for name, value in given.items() if value is not None}
        own = {name: value for name, value in preparation.settings.items() if name not in (SIVA_LAYERS, EXAMPLES)} | {
            "context": preparation.context,
            "train_adapters": SIVA_LAYERS in preparation.settings,
        }
        return LadderConfig(**{**self.fields, **given, **own})

    def prepare(self, model: Any, preparation: Preparation) -> Any:
        """A side network beside the model, of a prompted one beside its language model; and SiVA in the last
        `siva_layers` layers, where that is given."""
        from fastpeft.ladder import LadderModel
        from fastpeft.prompts.model import around

        config = self._config(preparation)

        def beside(base: Any) -> Any:
            if config.train_adapters:
                base = _with_siva(base, preparation, config.feature_modules)
            return LadderModel(base, config)

        return around(model, beside)

    def load(self, folder: Path, start: Callable[[], Any], whole: Callable[[], Any]) -> Any:
        from fastpeft.ladder import LadderModel
        from fastpeft.prompts.model import around

        base = start()
        model = around(base.model, lambda each: LadderModel.from_pretrained(folder, base=each))
        return replace(base, model=model)

    def load_checkpoint(self, model: Any, checkpoint: Path) -> None:
        from fastpeft.prompts.model import inside_prompt

        inside_prompt(model).take_over(checkpoint, head=True)

    def check_export(self, to: str, trained: str) -> None:
        if to != "onnx":
            raise FastpeftError(
                f"{trained} trained a side network ({self.title}), which works beside the layers of its backbone and "
                "cannot become a part of them. Load it from its own folder; one that learned labels by a head of its "
                "own, without a prompt, is exported to onnx too."
            )

    def check_successor(self, later: Method, run: EarlierRun) -> None:
        if not isinstance(later, SideNetworkMethod):
            raise FastpeftError(
                f"the run in {run.name!r} trained a side network and left its backbone as it was, so {later.name!r} "
                f"has nothing to start from. Choose a method with the same side network, {run.method} or mezo with "
                f"--set over={run.method}, or leave `init_from` out."
            )

    def start_later(self, run: EarlierRun, later: Preparation) -> Any:
        """What the earlier run started from; an adapter that trained with its side network is merged or trains on."""
        start = run.start()
        adapted, wanted = _siva_beside(run.preparation), _siva_beside(later)
        if adapted is None or adapted == wanted:
            return start
        if wanted is not None:
            name = next(name for name in wanted if wanted[name] != adapted[name])
            here, there = ("its own" if value is None else value for value in (wanted[name], adapted[name]))
            raise FastpeftError(
                f"{name} is {here}, but the run in {run.name!r} had {there}. Give that, or leave {SIVA_LAYERS} out to "
                "merge what was trained into the backbone."
            )
        from fastpeft.ladder.saving import with_adapter
        from fastpeft.methods.wrapping import merge
        from fastpeft.prompts.model import around

        model = around(start.model, lambda base: merge(with_adapter(base, str(run.folder), {})))
        name_after(model, run.folder)
        return replace(start, model=model)

    def continue_later(self, model: Any, run: EarlierRun) -> None:
        from fastpeft.prompts.model import inside_prompt

        inside_prompt(model).take_over(run.folder, head=run.same_head)

    def loading_snippet(self, folder: str, *, chained: bool, **known: Any) -> str:
        return loading_snippet(folder, adapter=False, ladder=True, chained=chained, **known)


def _siva_beside(preparation: Preparation) -> dict[str, Any] | None:
    """What decides the weights of SiVA beside a side network; None where there is none."""
    layers = preparation.settings.get(SIVA_LAYERS)
    if layers is None:
        return None
    return {SIVA_LAYERS: layers, **{f"`{name}`": getattr(preparation, name) for name in OF_SIVA}}


def _with_siva(model: Any, preparation: Preparation, feature_modules: Sequence[str] | None) -> Any:
    """The model with SiVA in its last layers, whose weights it leaves as they are: side networks know them."""
    from fastpeft.ladder.backbone import Backbone
    from fastpeft.methods.wrapping import wrap
    from fastpeft.support.logs import at_least

    if feature_modules is not None:
        raise FastpeftError(
            f"{SIVA_LAYERS} counts the layers that are found by themselves, but feature_modules names others. "
            "Leave out either, or put SiVA where you want it by peft.get_peft_model, with "
            "LadderConfig(train_adapters=True)."
        )
    count, layers = preparation.settings[SIVA_LAYERS], Backbone(model).layers
    if not 1 <= count <= len(layers):
        raise FastpeftError(
            f"{SIVA_LAYERS} is {count}; the model has {len(layers)} layers. Give a number from 1 to that."
        )
    chosen = {"layers_to_transform": [*range(len(layers) - count, len(layers))], "residual": "implicit"}
    siva = replace(preparation, head=(), task_type=None, settings=chosen)
    with at_least("fastpeft.siva.heads", logging.ERROR):  # the side network's model trains the head
        return wrap(model, siva, "SivaConfig", {} if preparation.rank is None else {"r": preparation.rank})
