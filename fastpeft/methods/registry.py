"""The one registry of methods: what the command line offers, what a run trains and what a comparison compares.

To add a method, write its `prepare` and add a line to `METHODS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_type_hints

from torch import nn

from fastpeft.errors import FastpeftError
from fastpeft.methods.preparation import Preparation
from fastpeft.methods.recipes import Recipe

OPTIONS = ("targets", "rank", "window", "reduction")  # of a run, for some methods only
SIVA_LAYERS = "siva_layers"  # the setting of a side network beside which SiVA trains


@dataclass(frozen=True)
class Method:
    """One way to fine-tune a model.

    Attributes:
        name: as given to `--method`.
        title: as written in a model card.
        description: one line.
        recipe: how it trains by default; the bundled model has its own, see `recipe_for`.
        prepare: makes a loaded model ready: sets what trains, and returns the module to train.
        settings: what `--set` may put into the method's configuration, with the type of each.
        check: raises `FastpeftError` where options or settings cannot be used with any model, or with such a head.
        options: which of the options in `OPTIONS` it takes.
        adapts: whether what it saves is a PEFT adapter.
        merges: whether such an adapter can become a part of its base's weights.
        base: makes of a loaded model what its adapter is put onto; None: it is put onto the model as it is.
        own_tokens: how many tokens of what the model reads it takes for itself.
        ladder: whether what it saves is a side network.
        direct: whether that is computed as its equations are written, by `DirectRun`.
        zeroth_order: whether it trains by MeZO, without gradients; it then takes the fields of `MeZOConfig`.
        usual_loop: whether that goes by MeZO's usual loop, which keeps no journal, in the place of the library's.
    """

    name: str
    title: str
    description: str
    recipe: Recipe
    prepare: Callable[[Any, Preparation], nn.Module]
    settings: Callable[[], dict[str, Any]] = dict
    check: Callable[[Preparation], Any] = lambda preparation: None
    options: tuple[str, ...] = ()
    adapts: bool = False
    merges: bool = True
    base: Callable[[Any], Any] | None = None
    own_tokens: Callable[[Preparation], int] = lambda preparation: 0
    ladder: bool = False
    direct: bool = False
    zeroth_order: bool = False
    usual_loop: bool = False

    def recipe_for(self, model: str) -> Recipe:
        """How it trains `model` by default."""
        return self.recipe.for_model(model, self.name)

    def check_merges(self, trained: str) -> None:
        """Raise `FastpeftError` where what was trained cannot become a part of its model's weights.

        Args:
            trained: what error messages call it.
        """
        if not self.merges:
            raise FastpeftError(
                f"{trained} is {self.title}, which cannot become a part of its model's weights: no other run starts "
                "from it, and it has no merged form. Load it from its own folder, or choose another method."
            )


def get_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method called `name`, as its settings make it: MeZO trains what another method leaves to train.

    Args:
        name: as given to `--method`.
        settings: as given by `--set`; only `over` matters here.

    Raises:
        FastpeftError: there is none, or MeZO cannot train over what `over` names.

    Example:
        >>> get_method("mezo", {"over": "k-lst"}).ladder
        True
    """
    if name not in METHODS:
        raise FastpeftError(f"unknown method {name!r}; allowed are {', '.join(METHODS)}. Choose one of these.")
    method = METHODS[name]
    if not (method.zeroth_order and settings and "over" in settings):
        return method
    trained = [other.name for other in METHODS.values() if not other.zeroth_order]
    over = settings["over"]
    if over not in trained:
        raise FastpeftError(
            f"over is {over!r}; {method.title} trains what another method leaves to train. Choose one of "
            f"{', '.join(trained)}."
        )
    return _over(method, METHODS[over])


def _over(method: Method, inner: Method) -> Method:
    """`inner`, trained in the way of `method`: what is prepared and saved is as `inner` does it."""

    def of_inner(preparation: Preparation) -> Preparation:
        own = {name: value for name, value in preparation.settings.items() if name != "over"}
        if inner.name == "siva":  # its steps are made even for Adam's, which are as long as the rate
            own.setdefault("scaling", "plain")
        return dataclasses.replace(preparation, settings=own)

    return dataclasses.replace(
        inner,
        name=method.name,
        title=method.title if inner.name == "full" else f"{method.title} over {inner.title}",
        description=method.description,
        recipe=method.recipe,
        zeroth_order=True,
        usual_loop=method.usual_loop,
        prepare=lambda model, preparation: inner.prepare(model, of_inner(preparation)),
        settings=lambda: {**method.settings(), **inner.settings()},
        check=lambda preparation: inner.check(of_inner(preparation)),
    )


def _prepare_full(model: nn.Module, _: Preparation) -> nn.Module:
    return model.requires_grad_(True)


def _prepare_head(model: nn.Module, preparation: Preparation) -> nn.Module:
    model.requires_grad_(False)
    for name in preparation.head:
        model.get_submodule(name).requires_grad_(True)
    return model


def _prepare_bitfit(model: nn.Module, preparation: Preparation) -> nn.Module:
    """The biases and the head."""
    _prepare_head(model, preparation)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name.endswith("bias"))
    return model


def _prepare_last_layers(model: nn.Module, preparation: Preparation) -> nn.Module:
    """The last `layers` blocks of the backbone (the report's 3) and the head."""
    from fastpeft.ladder.backbone import Backbone

    blocks = Backbone(model).layers
    count = preparation.settings.get("layers", min(3, len(blocks)))
    if not 1 <= count <= len(blocks):
        raise FastpeftError(f"layers is {count}; the model has {len(blocks)}. Give a number from 1 to that.")
    _prepare_head(model, preparation)
    for block in blocks[-count:]:
        block.requires_grad_(True)
    return model


def _ladder_settings() -> dict[str, Any]:
    from fastpeft.ladder import LadderConfig

    hints = get_type_hints(LadderConfig.__init__)
    own = {name: hint for name, hint in hints.items() if not name.startswith("base_") and name not in _NOT_SETTINGS}
    return {**own, SIVA_LAYERS: int}


def _ladder_config(preparation: Preparation, **defaults: Any) -> Any:
    from fastpeft.ladder import LadderConfig

    given = {"window_size": preparation.window, "reduction_factor": preparation.reduction}
    given = {name: value for name, value in given.items() if value is not None}
    own = {name: value for name, value in preparation.settings.items() if name != SIVA_LAYERS}
    return LadderConfig(**{**defaults, **given, **own}, train_adapters=SIVA_LAYERS in preparation.settings)


def _prepare_ladder(model: nn.Module, preparation: Preparation, direct: bool = False, **defaults: Any) -> nn.Module:
    """A side network beside the model; of a prompted one, beside the masked language model in it.

    With the setting `siva_layers` SiVA adapts so many of the model's last layers, and trains with it. `direct` computes
    it as its equations are written.
    """
    from fastpeft.ladder import LadderModel
    from fastpeft.ladder.direct_run import DirectRun
    from fastpeft.prompts.model import PromptModel

    config = _ladder_config(preparation, **defaults)

    def beside(base: Any) -> LadderModel:
        if config.train_adapters:
            base = _with_siva(base, preparation.settings[SIVA_LAYERS], config.feature_modules)
        ladder = LadderModel(base, config)
        if direct:
            ladder.side_run = DirectRun
        return ladder

    return model.around(beside) if isinstance(model, PromptModel) else beside(model)


def _with_siva(model: Any, count: int, feature_modules: Sequence[str] | None) -> Any:
    """The model with SiVA in the last `count` layers, whose weights it leaves as they are: side networks know them."""
    from peft import get_peft_model

    from fastpeft.ladder.backbone import Backbone
    from fastpeft.siva import SivaConfig

    if feature_modules is not None:
        raise FastpeftError(
            f"{SIVA_LAYERS} counts the layers that are found by themselves, but feature_modules names others. "
            "Leave out either, or put SiVA where you want it by peft.get_peft_model, with "
            "LadderConfig(train_adapters=True)."
        )
    layers = len(Backbone(model).layers)
    if not 1 <= count <= layers:
        raise FastpeftError(f"{SIVA_LAYERS} is {count}; the model has {layers} layers. Give a number from 1 to that.")
    chosen = list(range(layers - count, layers))
    return get_peft_model(model, SivaConfig(layers_to_transform=chosen, residual="implicit"))


_GATED: dict[str, Any] = {"window_size": 1, "fusion": "gated"}  # the original LST

# arguments of a LadderConfig that follow from the model or have an option of their own
_NOT_SETTINGS = ("causal", "train_adapters", "kwargs", "return", "window_size", "reduction_factor")


def _adapter(
    name: str,
    title: str,
    description: str,
    recipe: Recipe,
    config: str,
    rank: int | None,
    fields: Callable[[int], dict[str, Any]] = lambda rank: {},
    **others: Any,
) -> Method:
    """A method that is an adapter of PEFT.

    Args:
        name, title, description, recipe: as of `Method`.
        config: the name of its configuration in PEFT, or of SiVA's.
        rank: where a person gives none; None: it has no rank.
        fields: what the configuration is given beside a rank, which follows from that; of one without, from 0.
        others: further fields of `Method`.
    """
    base = others.get("base") or (lambda model: model)

    def prepare(model: nn.Module, preparation: Preparation) -> nn.Module:
        from fastpeft.methods.adapters import wrap

        chosen = preparation.rank or rank or 0
        return wrap(base(model), preparation, config, {**({"r": chosen} if chosen else {}), **fields(chosen)})

    def settings() -> dict[str, Any]:
        from fastpeft.methods.adapters import settings

        return settings(config)

    options = ("targets",) if rank is None else ("targets", "rank")
    given = {"options": options, **others}
    return Method(name, title, description, recipe, prepare, settings, adapts=True, **given)


def _in_4_bits(model: Any) -> Any:
    from fastpeft.methods.adapters import in_4_bits

    return in_4_bits(model)


def _check_4_bits(_: Preparation) -> None:
    from fastpeft.methods.adapters import check_4_bits

    check_4_bits()


_VIRTUAL_TOKENS = 10  # of a prompt, as PEFT's example of sequence classification has them


def _virtual_tokens(preparation: Preparation) -> int:
    count: int = preparation.settings.get("num_virtual_tokens", _VIRTUAL_TOKENS)
    if count < 1:
        raise FastpeftError(f"num_virtual_tokens is {count}; it must be a whole number from 1.")
    return count


def _check_virtual_tokens(preparation: Preparation) -> None:
    """Refuse a head whose outputs PEFT does not put right where it has put vectors before the words."""
    _virtual_tokens(preparation)
    if preparation.by_words or preparation.task_type != "SEQ_CLS":
        raise FastpeftError(
            "prompt tuning is for a classification head that reads a text as a whole: not for tags of words, masked "
            "words or label words. Choose another method, or add --prompt-head classifier to a prompt."
        )


_LADDER = Recipe(2e-4, warmup=0.12, schedule="polynomial", last_rate=2e-6)  # the report's
_LAST_LAYERS = Recipe(2e-5, weight_decay=0.01)  # the report's
_MEZO = Recipe(1e-6, warmup=0.0, schedule="constant", epochs=12)  # the report's: 48,000 steps, 11.4 epochs of SST-2
_FULL = Recipe(2e-5, weight_decay=0.1, epochs=10)  # Liu et al. 2019, RoBERTa on GLUE: the middle of their rates
_LORA = Recipe(4e-4, epochs=10)  # Hu et al. 2022, RoBERTa-large on SST-2; PiSSA is LoRA from another start
_QLORA = Recipe(2e-4)  # Dettmers et al. 2023, models of 7 and 13 billion weights
_IA3 = Recipe(3e-3)  # Liu et al. 2022
_PROMPT_TUNING = Recipe(1e-3, epochs=20)  # PEFT's example of RoBERTa-large
_BITFIT = Recipe(4e-4)  # Ben Zaken et al. 2022: between their 1e-4 and 1e-3
_SIVA = Recipe(1e-3)  # of ours, as the next; see `bench/data/siva_rates.csv`
_HEAD = Recipe(1e-3, weight_decay=0.01)

# of adapters: as PEFT has them, LoRA with its usual scaling of 2, what starts from the weight itself unscaled
METHODS = {
    method.name: method
    for method in (
        _adapter("siva", "SiVA", "top singular vectors train, the rest is frozen", _SIVA, "SivaConfig", 4),
        Method(
            name="k-lst",
            title="k-LST",
            description="a side network reads a window of backbone features",
            recipe=_LADDER,
            prepare=_prepare_ladder,
            settings=_ladder_settings,
            check=_ladder_config,
            options=("window", "reduction"),
            ladder=True,
        ),
        Method(
            name="lst",
            title="LST",
            description="a side network reads one feature a block, through a gate",
            recipe=_LADDER,
            prepare=partial(_prepare_ladder, **_GATED),
            settings=_ladder_settings,
            check=partial(_ladder_config, **_GATED),
            options=("reduction",),
            ladder=True,
        ),
        Method(
            name="full",
            title="full fine-tuning",
            description="every weight trains",
            recipe=_FULL,
            prepare=_prepare_full,
        ),
        Method(
            name="mezo",
            title="MeZO",
            description="every weight, or what another method trains (--set over=METHOD), by forward passes alone",
            recipe=_MEZO,
            prepare=_prepare_full,
            settings=lambda: {"over": str},
            zeroth_order=True,
        ),
        _adapter(
            "lora",
            "LoRA",
            "low-rank updates beside frozen weights",
            _LORA,
            "LoraConfig",
            8,
            lambda r: {"lora_alpha": 2 * r},
        ),
        _adapter(
            "pissa",
            "PiSSA",
            "LoRA that starts from the top singular triplets",
            _LORA,
            "LoraConfig",
            8,
            lambda r: {"lora_alpha": r, "init_lora_weights": "pissa"},
        ),
        _adapter(
            "dora",
            "DoRA",
            "LoRA with the length of each row of the weight apart from its direction",
            _LORA,
            "LoraConfig",
            8,
            lambda r: {"lora_alpha": 2 * r, "use_dora": True},
        ),
        _adapter(
            "olora",
            "OLoRA",
            "LoRA that starts from an orthonormal basis of the weight",
            _LORA,
            "LoraConfig",
            8,
            lambda r: {"lora_alpha": r, "init_lora_weights": "olora"},
        ),
        _adapter(
            "qlora",
            "QLoRA",
            "LoRA in all linear layers, beside weights in 4 bits",
            _QLORA,
            "LoraConfig",
            8,
            lambda r: {"lora_alpha": 2 * r, "target_modules": "all-linear"},
            base=_in_4_bits,
            check=_check_4_bits,
            merges=False,
        ),
        _adapter(
            "lokr",
            "LoKr",
            "updates that are Kronecker products of small matrices",
            _LORA,
            "LoKrConfig",
            8,
            lambda r: {"alpha": r},
        ),
        _adapter("ia3", "IA3", "factors on keys, values and the feed-forward's inside train", _IA3, "IA3Config", None),
        _adapter(
            "prompt-tuning",
            "prompt tuning",
            "vectors before the words of each text train",
            _PROMPT_TUNING,
            "PromptTuningConfig",
            None,
            lambda _: {"num_virtual_tokens": _VIRTUAL_TOKENS},
            options=(),
            check=_check_virtual_tokens,
            own_tokens=_virtual_tokens,
            merges=False,
        ),
        Method(
            name="last-n",
            title="last layers",
            description="the last layers (3) train",
            recipe=_LAST_LAYERS,
            prepare=_prepare_last_layers,
            settings=lambda: {"layers": int},
        ),
        Method(
            name="bitfit",
            title="BitFit",
            description="the biases train",
            recipe=_BITFIT,
            prepare=_prepare_bitfit,
        ),
        Method(
            name="head",
            title="head only",
            description="the classification head trains on frozen features",
            recipe=_HEAD,
            prepare=_prepare_head,
        ),
        Method(
            name="mezo-loop",
            title="MeZO by its usual loop",
            description="MeZO with noise drawn anew for each of four passes over the weights, to compare with",
            recipe=_MEZO,
            prepare=_prepare_full,
            settings=lambda: {"over": str},
            zeroth_order=True,
            usual_loop=True,
        ),
        Method(
            name="lst-direct",
            title="direct LST",
            description="LST written directly from its equations, to compare with",
            recipe=_LADDER,
            prepare=partial(_prepare_ladder, direct=True, **_GATED),
            settings=_ladder_settings,
            check=partial(_ladder_config, **_GATED),
            options=("reduction",),
            ladder=True,
            direct=True,
        ),
        Method(
            name="k-lst-direct",
            title="direct k-LST",
            description="k-LST written directly from its equations, to compare with",
            recipe=_LADDER,
            prepare=partial(_prepare_ladder, direct=True),
            settings=_ladder_settings,
            check=_ladder_config,
            options=("window", "reduction"),
            ladder=True,
            direct=True,
        ),
    )
}
