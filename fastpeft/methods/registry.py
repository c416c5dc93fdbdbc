"""The one registry of methods: what the command line offers, what a run trains and what a comparison compares.

A method is an entry of `METHODS`; it is of one of three kinds, which decide what is saved: the whole model, an adapter,
or a side network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.methods.adapter import AdapterMethod, PromptTuningMethod
from fastpeft.methods.method import OVER, Method
from fastpeft.methods.peft_types import PREFIX, method_of, types
from fastpeft.methods.preparation import ALL_LINEAR
from fastpeft.methods.recipes import Recipe
from fastpeft.methods.side_network import GATED, OF_SIVA, SideNetworkMethod
from fastpeft.methods.whole_model import WholeModelMethod, biases, everything, head, last_layers

# the paper's: 48,000 steps, 11.4 epochs of SST-2; of a narrow model six times the rate, by MPNet-base's loss on rows
# that it did not learn, see docs/results/accuracy.md
_MEZO = Recipe(
    1e-6,
    head_learning_rate=None,
    warmup=0.0,
    schedule="constant",
    epochs=12,
    least_steps=0,
    for_causal_lm={},
    for_narrow={"learning_rate": 6e-6},
)
_LORA = Recipe(4e-4)  # Hu et al. 2022, RoBERTa-large on SST-2; PiSSA is LoRA from another start
# of a narrow model three times the rate, measured with MPNet-base; see docs/results/accuracy.md
_LORA_BY_WIDTH = dataclasses.replace(_LORA, for_narrow={"learning_rate": 1.2e-3})
# all of a side network begins at random, and its head with it; of words the best of the rates measured here, see
# `bench/data/words_rates.csv`
_SIDE_NETWORK = Recipe(
    2e-3,
    head_learning_rate=None,
    warmup=0.12,
    for_causal_lm={"learning_rate": 3e-3, "least_steps": 0},
)

# what the methods of a family have in common
_lora = partial(AdapterMethod, recipe=_LORA, config="LoraConfig", rank=8)
_k_lst = partial(SideNetworkMethod, recipe=_SIDE_NETWORK)
_lst = partial(_k_lst, fields=GATED, options=("reduction", *OF_SIVA))


class _Methods(dict[str, Method]):
    """Methods by name. Beside those that it lists, `peft:TYPE` is any of PEFT's types of adapters, by LoRA's recipe."""

    def __contains__(self, name: object) -> bool:
        listed = super().__contains__(name)
        return listed or (isinstance(name, str) and name.startswith(PREFIX) and name[len(PREFIX) :] in types())

    def __missing__(self, name: str) -> Method:
        return method_of(name, _LORA_BY_WIDTH)


# of adapters: as PEFT has them, LoRA with its usual scaling of 2, what starts from the weight itself unscaled
METHODS: dict[str, Method] = _Methods(
    (method.name, method)
    for method in (
        AdapterMethod(
            name="siva",
            title="SiVA",
            description="top singular vectors train, the rest is frozen",
            recipe=Recipe(1e-3),  # measured here; see `bench/data/siva_rates.csv`
            config="SivaConfig",
            rank=8,
            by_mezo={"scaling": "plain"},  # the other form evens out the steps of Adam, which are as long as the rate
        ),
        _k_lst(
            name="k-lst",
            title="k-LST",
            description="a side network reads a window of backbone features",
        ),
        _lst(
            name="lst",
            title="LST",
            description="a side network reads one feature a block, through a gate",
        ),
        WholeModelMethod(
            name="full",
            title="full fine-tuning",
            description="every weight trains",
            # Liu et al. 2019; Devlin et al. 2019
            recipe=Recipe(2e-5, weight_decay=0.1, for_narrow={"learning_rate": 5e-5}),
            trains=everything,
        ),
        WholeModelMethod(
            name="mezo",
            title="MeZO",
            description="every weight, or what another method trains (--set over=METHOD), by forward passes alone",
            recipe=_MEZO,
            trains=everything,
            zeroth_order=True,
        ),
        _lora(
            name="lora",
            title="LoRA",
            description="low-rank updates beside frozen weights",
            recipe=_LORA_BY_WIDTH,
            fields=lambda r: {"lora_alpha": 2 * r},
        ),
        _lora(
            name="pissa",
            title="PiSSA",
            description="LoRA that starts from the top singular triplets",
            fields=lambda r: {"lora_alpha": r, "init_lora_weights": "pissa"},
        ),
        _lora(
            name="dora",
            title="DoRA",
            description="LoRA with the length of each row of the weight apart from its direction",
            recipe=_LORA_BY_WIDTH,
            fields=lambda r: {"lora_alpha": 2 * r, "use_dora": True},
        ),
        _lora(
            name="olora",
            title="OLoRA",
            description="LoRA that starts from an orthonormal basis of the weight",
            fields=lambda r: {"lora_alpha": r, "init_lora_weights": "olora"},
        ),
        _lora(
            name="qlora",
            title="QLoRA",
            description="LoRA in all linear layers, beside weights in 4 bits",
            recipe=Recipe(2e-4),  # Dettmers et al. 2023, models of 7 and 13 billion weights
            fields=lambda r: {"lora_alpha": 2 * r, "target_modules": ALL_LINEAR},
            four_bits=True,
            merges=False,
        ),
        AdapterMethod(
            name="lokr",
            title="LoKr",
            description="updates that are Kronecker products of small matrices",
            recipe=_LORA,
            config="LoKrConfig",
            rank=8,
            fields=lambda r: {"alpha": r},
        ),
        AdapterMethod(
            name="ia3",
            title="IA3",
            description="factors on keys, values and the feed-forward's inside train",
            recipe=Recipe(3e-3),  # Liu et al. 2022
            config="IA3Config",
            options=("targets",),
        ),
        PromptTuningMethod(
            name="prompt-tuning",
            title="prompt tuning",
            description="vectors before the words of each text train",
            recipe=Recipe(1e-3),  # PEFT's example of RoBERTa-large
        ),
        WholeModelMethod(
            name="last-n",
            title="last layers",
            description="the last layers (3) train",
            # the paper's; `bench/data/base_rates.csv`
            recipe=Recipe(2e-5, weight_decay=0.01, for_narrow={"learning_rate": 1.8e-4}),
            trains=last_layers,
            takes={"layers": int},
        ),
        WholeModelMethod(
            name="bitfit",
            title="BitFit",
            description="the biases train",
            recipe=Recipe(4e-4),  # Ben Zaken et al. 2022: between their 1e-4 and 1e-3
            trains=biases,
        ),
        WholeModelMethod(
            name="head",
            title="head only",
            description="the classification head trains on frozen features",
            # the rates of new heads that train beside others, of which `learning_rate` is the one here
            recipe=Recipe(8e-3, head_learning_rate=None, weight_decay=0.01, for_narrow={"learning_rate": 1.5e-2}),
            trains=head,
        ),
    )
)


def unknown(name: str, *more: str) -> FastpeftError:
    """The error where there is no method `name`, nor one of the names in `more`."""
    if name.startswith(PREFIX):
        near = did_you_mean(name.removeprefix(PREFIX), types())
        return FastpeftError(f"unknown type of PEFT in {name!r}; allowed are {', '.join(types())}. Choose one.{near}")
    allowed = (*METHODS, *more)
    return FastpeftError(
        f"unknown method {name!r}; allowed are {', '.join(allowed)}, and {PREFIX}TYPE with a type of PEFT. Choose one "
        f"of these.{did_you_mean(name, allowed)}"
    )


def get_method(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method called `name`, as its settings make it: MeZO trains what another method leaves to train.

    Args:
        name: as given to `--method`.
        settings: as given by `--set`; only `over` matters here.

    Raises:
        FastpeftError: there is none, or MeZO cannot train over what `over` names.

    Example:
        >>> get_method("mezo", {"over": "k-lst"}).frozen_features
        True
    """
    if name not in METHODS:
        raise unknown(name)
    method = METHODS[name]
    if not (method.zeroth_order and settings and OVER in settings):
        return method
    trained = [other.name for other in METHODS.values() if not other.zeroth_order]
    over = settings[OVER]
    if over not in trained:
        raise FastpeftError(
            f"over is {over!r}; {method.title} trains what another method leaves to train. Choose one of "
            f"{', '.join(trained)}."
        )
    inner = METHODS[over]
    return dataclasses.replace(
        inner,
        name=method.name,
        title=method.title if over == "full" else f"{method.title} over {inner.title}",
        description=method.description,
        recipe=method.recipe,
        zeroth_order=method.zeroth_order,
    )
