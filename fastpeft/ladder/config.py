"""The configuration of a side network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from fastpeft.errors import FastpeftError, did_you_mean
from fastpeft.functional import MAX_WINDOW
from fastpeft.models import SIDE_NETWORK
from fastpeft.ops.quantise import Format, check_format

Fusion = Literal["cross_attention", "gated"]
BackboneDtype = Literal["bfloat16", Format]
OutputMix = Literal["add", False]
Residual = bool | Literal["state"]
STATE: Literal["state"] = "state"

# the fields that decide which weights there are and what they mean
SHAPE = (
    "window_size",
    "reduction_factor",
    "layers_per_block",
    "fusion",
    "residual",
    "normalise_features",
    "share_projections",
    "output_mix",
    "feature_modules",
    "causal",
    "context",
)

_MOST_BLOCKS = 6  # of the default
_WIDE_WINDOW, _WIDE_WINDOW_DROPOUT = 9, 0.2  # the paper drops features from 9 slots on


class LadderConfig(PretrainedConfig):
    """Configuration of a `LadderModel`: how its side network reads the backbone.

    Args:
        window_size: number k of backbone features that each side block reads, centred at its own; odd, 1 to 15.
        reduction_factor: the backbone's width divided by the side network's; it must divide the former.
        layers_per_block: layers of the backbone for each side block, counted from the last. With 3 there is a block at
            every third layer, and the side network takes a third of its memory and time. A window is still of layers
            that follow each other. 1 is the paper's. None is the least with which there are at most six blocks: more
            were no better on classes and tags, and worse for language modelling.
        feature_dropout: probability of dropping an element of a projected feature in training. None is 0.2 for windows
            of 9 or more and 0 below.
        fusion: `"cross_attention"` lets the side state attend to the window; `"gated"` is the original LST, which mixes
            the state with the one feature of a window of 1 by a trained gate.
        residual: whether a token's own feature, that of the window's middle, is added to the cross-attention's output.
            Without it, as in the paper, all tokens begin with nearly the same state. `"state"` adds the side state too,
            which carries what earlier blocks found. None is `"state"` beside a head of tags, True where else each token
            is answered for, by the class of a transformers model (words, questions, or no head at all), else False.
        normalise_features: whether a feature is divided by its root mean square, token by token, before it is
            projected. In a decoder a few tokens have features a hundred times as large as others, and drown them in the
            attention. None is True beside a causal backbone, and with `residual`; else False.
        layer_drop: probability of leaving out a side block in a training pass; the state then passes unchanged. The
            processes of `torch.distributed` leave out the same blocks, drawn by the first process, so all must make
            each pass; `DistributedDataParallel` needs `find_unused_parameters=True`.
        share_projections: whether all side blocks share one projection per slot, instead of one for each block.
        output_mix: what the head reads. False is the side network's output in place of the backbone's. `"add"` is the
            backbone's and, in units of its size, the side network's, which starts at zero: the model starts as its
            base. None is `"add"` beside a head that predicts words, such as a decoder's, and False beside any other.
        feature_modules: names of the backbone's layers in the model, in the order in which they run, or of the one
            `ModuleList` or `Sequential` that holds them. None finds them.
        causal: whether tokens see only those before them. None does as the backbone does, found by a pass over four
            tokens. False is refused for a model that predicts next tokens.
        context: token ids that a decoder reads once, in front of every text, such as those of a few examples; see
            `fastpeft.ladder.context`. The side network reads the text alone. None is none.
        train_adapters: whether the active adapter of a base that PEFT wraps trains with the side network, through the
            features that it changes. The layers before the first that it adapts still run without gradients, so an
            adapter in the last layers costs little memory.
        backbone_dtype: convert the frozen backbone: `"bfloat16"` all of it; `"int8"`, `"nf4"` or `"nf4-double"` the
            weights of its linear layers, at 1, 0.5625 or 0.516 bytes each. A CPU that multiplies in int8 does so, with
            activations in 8 bits too; else each product dequantises the weight. nf4 needs the package bitsandbytes.
            Embeddings, norms and biases then keep the dtype in which they were loaded, and the backbone computes in it.
            None changes nothing.
        pack_weights: whether the backbone's linear layers keep a packed copy of their weight on a CPU, see
            `fastpeft.pack_frozen`, which is faster and takes as many bytes again. With `backbone_dtype="bfloat16"` the
            copy takes the place of the weight. On a GPU they keep a cast copy, under autocast.
        base_model_name_or_path, base_revision, base_class, base_activation: filled in: what the side network was
            trained on, and the activation function that it took from it.
        base_fingerprints: filled in when saving: fingerprints of the backbone's weights.

    Raises:
        FastpeftError: an argument is out of its range, or its name is nearly that of another.

    Example:
        >>> LadderConfig(window_size=5).window_size
        5
    """

    model_type = SIDE_NETWORK

    def __init__(
        self,
        window_size: int = 9,
        reduction_factor: int = 8,
        layers_per_block: int | None = None,
        feature_dropout: float | None = None,
        fusion: Fusion = "cross_attention",
        residual: Residual | None = None,
        normalise_features: bool | None = None,
        layer_drop: float = 0.0,
        share_projections: bool = False,
        output_mix: OutputMix | None = None,
        feature_modules: Sequence[str] | str | None = None,
        causal: bool | None = None,
        context: Sequence[int] | None = None,
        train_adapters: bool = False,
        backbone_dtype: BackboneDtype | None = None,
        pack_weights: bool = True,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_class: str | None = None,
        base_activation: str | None = None,
        base_fingerprints: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        _refuse_misspelt(kwargs)
        self.window_size = window_size
        self.reduction_factor = reduction_factor
        self.layers_per_block = layers_per_block
        self.feature_dropout = feature_dropout
        self.fusion = fusion
        self.residual = residual
        self.normalise_features = normalise_features
        self.layer_drop = layer_drop
        self.share_projections = share_projections
        self.output_mix = output_mix
        self.feature_modules = [feature_modules] if isinstance(feature_modules, str) else _copied(feature_modules)
        self.causal = causal
        self.context = _copied(context)
        self.train_adapters = train_adapters
        self.backbone_dtype = backbone_dtype
        self.pack_weights = pack_weights
        self.base_model_name_or_path = base_model_name_or_path
        self.base_revision = base_revision
        self.base_class = base_class
        self.base_activation = base_activation
        self.base_fingerprints = dict(base_fingerprints or {})
        self._check_each()
        self._check_together()
        super().__init__(**kwargs)

    @property
    def dropout(self) -> float:
        """The probability of feature dropout, with None resolved."""
        default = _WIDE_WINDOW_DROPOUT if self.window_size >= _WIDE_WINDOW else 0.0
        return default if self.feature_dropout is None else self.feature_dropout

    def step(self, num_layers: int) -> int:
        """Layers of the backbone for each side block, with None resolved for a backbone of so many layers."""
        return self.layers_per_block or math.ceil(num_layers / _MOST_BLOCKS)

    def _check_each(self) -> None:
        """Refuse values that a field cannot have."""
        for name in ("window_size", "reduction_factor", "layers_per_block"):
            value = getattr(self, name)
            decided = value is None and name == "layers_per_block"
            if not (decided or (type(value) is int and value > 0)):
                raise FastpeftError(f"{name}={value!r}; give a whole number from 1.")
        if self.window_size % 2 == 0 or self.window_size > MAX_WINDOW:
            raise FastpeftError(
                f"window_size={self.window_size}; a window is centred at a layer and holds at most {MAX_WINDOW} "
                "features. Give an odd number from 1, such as 9."
            )
        for name, value in (("feature_dropout", self.dropout), ("layer_drop", self.layer_drop)):
            if not (isinstance(value, (int, float)) and 0 <= value < 1):
                raise FastpeftError(f"{name}={value!r}; give a probability from 0 to below 1.")
        for name in ("share_projections", "train_adapters", "pack_weights", "normalise_features", "causal"):
            value, decided = getattr(self, name), name in ("normalise_features", "causal")
            if not (isinstance(value, bool) or (value is None and decided)):
                raise FastpeftError(f"{name}={value!r}; allowed are True and False{', or None' if decided else ''}.")
        if self.fusion not in get_args(Fusion):
            raise FastpeftError(f"fusion={self.fusion!r}; allowed are {' and '.join(map(repr, get_args(Fusion)))}.")
        if not (self.output_mix is None or self.output_mix is False or self.output_mix == "add"):
            raise FastpeftError(f"output_mix={self.output_mix!r}; allowed are 'add' and False, or None.")
        if not (self.residual in (None, STATE) or isinstance(self.residual, bool)):
            raise FastpeftError(f"residual={self.residual!r}; allowed are {STATE!r}, True and False, or None.")
        check_format("backbone_dtype", self.backbone_dtype, "bfloat16")
        tokens, names = self.context, self.feature_modules
        if tokens is not None and not _is_list_of(int, tokens):
            raise FastpeftError(f"context={tokens!r}; give a list of token ids, at least one, or None.")
        if names is not None and not _is_list_of(str, names):
            raise FastpeftError(
                f"feature_modules={names!r}; give a list with the names of the backbone's layers, or None to find them."
            )

    def _check_together(self) -> None:
        """Refuse fields that exclude each other."""
        if self.fusion == "gated" and (self.window_size != 1 or self.residual):
            raise FastpeftError(
                f"fusion='gated' with window_size={self.window_size} and residual={self.residual}: a gate mixes one "
                "feature, without attention. Give window_size=1 and leave residual out, or use "
                "fusion='cross_attention'."
            )
        if self.backbone_dtype is not None and self.train_adapters:
            raise FastpeftError(
                f"backbone_dtype={self.backbone_dtype!r} with train_adapters=True (siva_layers): an adapter trains on "
                "the weights it was made for. Leave out either; the base itself may be loaded in bfloat16."
            )
        if self.context is not None and self.train_adapters:
            raise FastpeftError(
                "context with train_adapters=True (siva_layers): the context is read once, and an adapter in the "
                "backbone would change what it is. Leave out either."
            )


def _is_list_of(kind: type, given: Any) -> bool:
    """Whether it is a list of one or more of that kind; a bool is no int here."""
    return (
        isinstance(given, list)
        and bool(given)
        and all(isinstance(each, kind) and not isinstance(each, bool) for each in given)
    )


def _copied(given: Any) -> Any:
    """A sequence as a list of its own, as files hold it; anything else as it is."""
    return list(given) if isinstance(given, Sequence) else given


def _refuse_misspelt(names: Iterable[str]) -> None:
    """Raise `FastpeftError` where a name is nearly that of a field.

    All others are kept, as any configuration of transformers does: saved files have fields of other versions.
    """
    fields = list(inspect.signature(LadderConfig.__init__).parameters)[1:-1]
    for name in names:
        advice = did_you_mean(name, fields, cutoff=0.8)  # no field of transformers' own configurations is so near
        is_property = isinstance(getattr(LadderConfig, name, None), property)
        if (advice or is_property) and not hasattr(PretrainedConfig, name):
            raise FastpeftError(f"LadderConfig has no field {name!r}.{advice} Fields are {', '.join(fields)}.")
