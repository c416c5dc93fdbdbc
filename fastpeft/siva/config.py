"""The configuration of a SiVA adapter."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import peft
from peft import PeftConfig, PeftType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from fastpeft.errors import FastpeftError
from fastpeft.ops.quantise import Format, check_format
from fastpeft.siva.pissa import PissaAdapter
from fastpeft.siva.quantise import ITERATIONS
from fastpeft.siva.rows import BASE
from fastpeft.support.model_card import loading_snippet, model_card, write_card

Residual = Literal["frozen", "implicit"]
Bias = Literal["none", "all", "siva_only"]
Scaling = Literal["spectral", "plain"]
InitWeights = bool | Literal["saved"]


def check_name(adapter_name: str) -> None:
    """Raise `FastpeftError` unless the tensors of an adapter can have its name."""
    # PEFT cuts the name out of the keys of a head's tensors, and leaves out keys of others that end in it
    taken = adapter_name in (BASE, "weight", "bias", "scale")
    taken |= any(hasattr(kind(), adapter_name) for kind in (nn.ParameterDict, BufferDict))
    if not adapter_name or "." in adapter_name or taken:
        raise FastpeftError(
            f"adapter name {adapter_name!r}; give one that is not empty, has no dot and is no attribute of modules, as "
            f"'keys' and 'weight' are ({BASE!r} is the pretrained model)."
        )


def check_residual(residual: str, d: int | None, residual_dtype: str | None) -> None:
    """Raise `FastpeftError` unless the residual mode exists and can hold a decomposition of rank d in such a dtype."""
    if residual not in get_args(Residual):
        raise FastpeftError(f"residual={residual!r}; allowed are {' and '.join(map(repr, get_args(Residual)))}.")
    if residual == "implicit" and d is not None:
        raise FastpeftError(
            f"d={d} with residual='implicit': a lower d replaces the weight, which 'implicit' leaves untouched. Use "
            "residual='frozen', or d=None."
        )
    check_format("residual_dtype", residual_dtype)
    if residual_dtype is not None and (residual == "implicit" or d is not None):
        other = "residual='implicit'" if residual == "implicit" else f"d={d}"
        raise FastpeftError(
            f"residual_dtype={residual_dtype!r} with {other}: a quantised residual is made of the whole weight and "
            "takes its place. Use residual='frozen' and d=None, or residual_dtype=None."
        )


def is_all_linear(target_modules: Any) -> bool:
    """Whether targets are PEFT's word for all linear layers."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


@dataclass
class SivaConfig(PeftConfig):
    r"""Configuration of a SiVA adapter, used as any PEFT configuration is.

    `h = x W_r^T + ((x V^T) * s) U^T + b` with `U = U0 + dU` and `V = V0 + dV`, where `U0 diag(s) V0` are the top-r
    singular triplets of the pretrained weight, dU and dV train from 0, and the rest `W_r` is frozen.

    Args:
        r: Number of singular triplets that train.
        target_modules: Names (suffixes) of the linear layers, a regular expression that a whole name must match,
            or `"all-linear"`. None takes all linear layers but those that read more than a hidden state, as the second
            one of a feed-forward: for their gradients that wide input would be kept. Heads of transformers models are
            never targeted. In other modules nothing marks the head: their output layer is taken too, as with LoRA. A
            layer that is smaller than r then gets its full rank, which is logged and written into `rank_pattern`.
        d: Rank of the decomposition. None keeps the weight whole. A lower rank drops the smallest singular values on
            purpose and needs `residual="frozen"`.
        residual: `"frozen"` stores `W_r` in place of the weight. `"implicit"` leaves the weight untouched and
            subtracts the initial triplets at run time, so that any adapters can share one base model. On a base that
            bitsandbytes has in 4 bits it is always that.
        residual_dtype: `"int8"`, `"nf4"` or `"nf4-double"`, as QLoRA has it, stores `W_r` in about 8, 4.5 or 4.13 bits
            a weight, which each product dequantises; nf4 needs the package bitsandbytes. None keeps the dtype of the
            weight. Rounding loses the pretrained weight: merging works, `unload()` is refused.
        quant_iterations: With `residual_dtype`, how often the factors are fitted again to what quantising lost.
            0 takes the weight's own triplets, as QPiSSA does.
        svd_niter: None decomposes exactly: to float32, which takes long beside a language model of billions of
            weights. A number decomposes nearly, by that many power iterations, in a small part of the time, as PEFT's
            `pissa_niter_4` does. The model computes what it computed before all the same. With `quant_iterations`,
            whose turns are short, None is 4.
        pack_weights: Whether a layer on a CPU keeps its frozen weight a second time, in the layout that its product
            reads fastest, and a third time, transposed, once a gradient flows through it. Under autocast the copies are
            in autocast's dtype, and nothing is cast at each call; on a GPU there is one then, and none without
            autocast. They are made at first use, made again when the weight changes, and never saved. False saves their
            memory. The adapter that a layer is made for decides.
        scaling: How far an optimizer's step moves a triplet. `"spectral"`: equally far for every triplet of every
            layer, and less far the more layers and triplets there are, so that a learning rate found for one model and
            rank serves another.
            `"plain"`: in proportion to the triplet's singular value, as if U and V themselves trained.
        rank_pattern: Ranks of single layers, `{name or regular expression: r}`.
        layers_to_transform: Indices of the blocks to adapt; None adapts all. It does not go with a regular expression
            in `target_modules`.
        layers_pattern: Name of the list of blocks, where it is not the usual one; with `layers_to_transform`.
        exclude_modules: Names or a regular expression of layers to leave out.
        modules_to_save: Further modules that train and are saved whole. With the task types SEQ_CLS, TOKEN_CLS and
            QUESTION_ANS all parts of the head are added by themselves.
        trainable_token_indices: Tokens whose embeddings train and are saved, `[token, ...]` for the model's input
            embeddings or `{name of an embedding: [token, ...]}`. Weights that are tied to them follow. Refused where
            these are of an output layer with a bias, as in masked-word heads.
        bias: Biases that train and are saved: `"none"`, `"all"` of the model, or `"siva_only"`, those of the adapted
            layers. They are the model's own: they stay when the adapter is disabled, unloaded or deleted.
        init_weights: True starts from the pretrained model. False, for tests, starts from a random change of it, as
            LoRA's `init_lora_weights=False` does. `"saved"`, which saved configurations hold, decomposes nothing: the
            layers wait for a saved adapter.
        pissa: Folder of a PiSSA adapter that is trained further, see `from_pissa`. Saved configurations hold None.
        base_fingerprints: Filled in: the fingerprint of each adapted layer's pretrained weight.
        target_parameters, layer_replication: LoRA's; here they are refused.

    Raises:
        FastpeftError: r below 1, an unknown residual, residual_dtype, scaling or bias, biases with a PEFT before 0.21,
            d or residual_dtype with `residual="implicit"`, d with residual_dtype or svd_niter, nf4 without
            bitsandbytes, layers_to_transform with a regular expression, layers_pattern without layers_to_transform, or
            one of LoRA's fields that are refused.

    Example:
        >>> import fastpeft, peft
        >>> model = peft.get_peft_model(base, fastpeft.SivaConfig(task_type="SEQ_CLS"))  # doctest: +SKIP
    """

    r: int = 8
    target_modules: Collection[str] | str | None = None
    d: int | None = None
    residual: Residual = "frozen"
    residual_dtype: Format | None = None
    quant_iterations: int = ITERATIONS
    svd_niter: int | None = None
    pack_weights: bool = True
    scaling: Scaling = "spectral"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: Bias = "none"
    init_weights: InitWeights = True
    pissa: str | None = None
    base_fingerprints: dict[str, str] = field(default_factory=dict)
    target_parameters: list[str] | None = None
    layer_replication: list[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SIVA
        if self.init_weights not in (True, False, "saved"):
            raise FastpeftError(f"init_weights={self.init_weights!r}; allowed are True, False and 'saved'.")
        if self.scaling not in get_args(Scaling):
            raise FastpeftError(f"scaling={self.scaling!r}; allowed are {' and '.join(map(repr, get_args(Scaling)))}.")
        ranks = {"r": self.r, **({} if self.d is None else {"d": self.d})}
        if not isinstance(self.rank_pattern, dict):
            raise FastpeftError(f"rank_pattern={self.rank_pattern!r}; give a dictionary of layer names and ranks.")
        ranks |= {f"rank_pattern[{name!r}]": rank for name, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if type(rank) is not int or rank < 1:
                raise FastpeftError(f"{name}={rank!r}; a rank is a whole number from 1.")
        self._check_layers()
        self._check_further()
        check_residual(self.residual, self.d, self.residual_dtype)
        if type(self.quant_iterations) is not int or self.quant_iterations < 0:
            raise FastpeftError(f"quant_iterations={self.quant_iterations!r}; give a whole number from 0.")
        if self.svd_niter is not None and (type(self.svd_niter) is not int or self.svd_niter < 0):
            raise FastpeftError(f"svd_niter={self.svd_niter!r}; give a whole number from 0, or None.")
        if self.svd_niter is not None and self.d is not None:
            raise FastpeftError(
                f"svd_niter={self.svd_niter} with d={self.d}: a lower d drops triplets, which must be known exactly. "
                "Leave out either."
            )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is None or isinstance(value, str):
                continue
            if not (isinstance(value, Collection) and all(isinstance(each, str) for each in value)):
                raise FastpeftError(f"{name}={value!r}; give a list of names, or one regular expression.")
            setattr(self, name, set(value))  # as PEFT's own configurations keep them

    def _check_layers(self) -> None:
        """Keep chosen blocks as a list, and refuse, as LoRA does, a choice that PEFT would ignore silently."""
        layers = self.layers_to_transform
        if layers is not None and type(layers) is not int:
            if not (isinstance(layers, Collection) and all(type(i) is int for i in layers)):
                raise FastpeftError(
                    f"layers_to_transform={layers!r}; give the number of a block, or a list of numbers."
                )
            self.layers_to_transform = [*layers]  # a file holds a list, and no range
        if isinstance(self.target_modules, str) and not is_all_linear(self.target_modules):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise FastpeftError(
                        f"{name}={getattr(self, name)!r} with target_modules={self.target_modules!r}: blocks are "
                        "chosen among layers that a list names. Give target_modules as a list of names or as "
                        f"{INCLUDE_LINEAR_LAYERS_SHORTHAND!r}, or choose the blocks in the regular expression itself."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise FastpeftError(
                f"layers_pattern={self.layers_pattern!r} without layers_to_transform chooses nothing. Give the numbers "
                "of the blocks in layers_to_transform too."
            )

    def _check_further(self) -> None:
        """Refuse settings of what trains beside the factors that SiVA or this PEFT cannot follow."""
        if self.bias not in get_args(Bias):
            raise FastpeftError(f"bias={self.bias!r}; allowed are {', '.join(map(repr, get_args(Bias)))}.")
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise FastpeftError(
                f"bias={self.bias!r} with peft {peft.__version__}, which saves the biases of LoRA alone. Install peft "
                "0.21 or newer, or use bias='none'."
            )
        given = self.trainable_token_indices
        for tokens in given.values() if isinstance(given, dict) else [] if given is None else [given]:
            numbers = isinstance(tokens, (list, tuple)) and all(type(token) is int and token >= 0 for token in tokens)
            if not numbers or len(set(tokens)) < len(tokens):
                raise FastpeftError(
                    f"trainable_token_indices={given!r}; give a list of different token numbers from 0, or a "
                    "dictionary of such lists by the names of embeddings."
                )
        if self.target_parameters:
            raise FastpeftError(
                f"target_parameters={self.target_parameters!r}: SiVA decomposes weights of linear layers, and a "
                "parameter of another module, as of stacked experts, is none. Name linear layers in target_modules, or "
                "use LoRA."
            )
        if self.layer_replication:
            raise FastpeftError(
                f"layer_replication={self.layer_replication!r}: replicated layers share their weights, and SiVA would "
                "change the weight of all. Replicate the layers in the base model, or use LoRA."
            )

    @classmethod
    def from_pissa(
        cls, path: str | Path, residual: Residual = "frozen", residual_dtype: Format | None = None
    ) -> SivaConfig:
        """The configuration that makes a trained PiSSA adapter of PEFT a SiVA adapter.

        Give it to `get_peft_model` with the base model of the PiSSA adapter. The model then computes what that adapter
        computes, with the modules that it saved whole, such as a classification head. It trains, saves, merges and
        exports as any SiVA adapter does. The two methods have one form in different coordinates:
        `U = B (c / S0)^1/2`, `V = (c / S0)^1/2 A`, where c is PEFT's scaling and S0 the singular values of the weight.

        Args:
            path: A local folder that `save_pretrained` wrote.
            residual, residual_dtype: As in `SivaConfig`. A quantised residual is made from the adapter's own factors.

        Raises:
            FastpeftError: The folder holds no PiSSA adapter, or one that SiVA cannot take over: from a randomised
                decomposition (`pissa_niter_...`), which cannot be made again, or with DoRA or biases. When the model
                is made: its layers are not those of the adapter.

        Example:
            >>> model = peft.get_peft_model(base, SivaConfig.from_pissa("pissa-adapter"))  # doctest: +SKIP
        """
        return cls(
            **PissaAdapter.read(path).settings, residual=residual, residual_dtype=residual_dtype, pissa=str(path)
        )

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        if self.pack_weights:
            del values["pack_weights"]  # an adapter's file says nothing about where it runs, unless it must
        return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, as a loaded adapter needs it, and a model card."""
        made_from = self.init_weights, self.pissa
        self.init_weights, self.pissa = "saved", None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.init_weights, self.pissa = made_from
        self._write_card(Path(save_directory))

    def _write_card(self, folder: Path) -> None:
        base = self.base_model_name_or_path or "the base model"
        settings = {"r": self.r, "d": self.d or "full", "residual": self.residual}
        if self.residual_dtype is not None:
            settings |= {"residual_dtype": self.residual_dtype}
        text = model_card(
            base_model=self.base_model_name_or_path,
            method="SiVA",
            snippet=loading_snippet(folder.name, base_model=base, task_type=self.task_type),
            settings=settings | {"target_modules": ", ".join(self.to_dict()["target_modules"] or [])},
        )
        write_card(folder, text)
