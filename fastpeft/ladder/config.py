"""What a side network is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from fastpeft.data.models import SIDE_NETWORK
from fastpeft.errors import FastpeftError
from fastpeft.functional import MAX_WINDOW
from fastpeft.ops.quantise import Format, check_library

Fusion = Literal["cross_attention", "gated"]
Init = Literal["random", "pruned"]
BackboneDtype = Literal["bfloat16", Format]

# what of a configuration decides which weights there are and what they mean
SHAPE = (
    "window_size",
    "reduction_factor",
    "fusion",
    "num_heads",
    "residual",
    "side_heads",
    "share_projections",
    "output_mix",
    "feature_modules",
    "feature_sizes",
    "causal",
)

_WIDE_WINDOW = 9  # slots from which the report drops features
_WIDE_WINDOW_DROPOUT = 0.2


def check_backbone_dtype(dtype: str | None) -> None:
    """Raise `FastpeftError` unless a backbone can be brought to `dtype`, and the library that it needs is there."""
    if dtype is not None and dtype not in get_args(BackboneDtype):
        allowed = ", ".join(map(repr, get_args(BackboneDtype)))
        raise FastpeftError(f"backbone_dtype={dtype!r}; allowed are {allowed}, or None for the base model's own.")
    check_library("backbone_dtype", dtype)


class LadderConfig(PretrainedConfig):
    """Configuration of a `LadderModel`: how its side network reads the backbone.

    Args:
        window_size: Number k of backbone features that each side block reads, centred at its own; odd, 1 to 15.
        reduction_factor: The side network is so many times narrower than the backbone, whose width it divides.
        feature_dropout: Probability with which elements of projected features are dropped in training. None is 0.2
            for windows of 9 or more and 0 below.
        fusion: `"cross_attention"` lets the side state attend to the window; `"gated"` mixes the state with the one
            feature of a window of 1 by a trained gate, which is the original LST.
        num_heads: Heads of the cross-attention; above 1 it has an output projection.
        residual: Whether the cross-attention's output is added to the side state, and normalised. The report's is not.
        side_heads: Self-attention heads of a side block. None is one per 64 of its width, at least 1.
        init: What the side network starts from: `"random"` weights, or the backbone's own, `"pruned"` to the channels
            and neurons of the largest magnitude.
        layer_drop: Probability with which a side block is left out of a training pass; the state then goes on as it is.
            Where `torch.distributed` is initialised, its processes leave out the same blocks, those that the first one
            draws, so each makes every such pass; `DistributedDataParallel` needs `find_unused_parameters=True`.
        share_projections: Whether a slot has one projection for all side blocks, in place of one for each.
        output_mix: Whether what goes on to the head is a trained mix of the side network's output and the backbone's,
            which alone it is at the start.
        feature_modules: Names in the model of the backbone's layers, in the order in which they run, or of the one
            `ModuleList` that holds them. None finds them in a transformers model; of another module they are needed.
        feature_sizes: Widths of the L + 1 features, the first of which is the input of the first layer. None takes
            that of the model's configuration, or those of the layers' matrices where it has none.
        causal: Whether tokens see only those before them. None takes over what the backbone does, which a pass over
            four tokens tells. False is refused beside a model that predicts next tokens. It must be given beside a
            module that is no transformers model and answers for each token, `(B, T, classes)`.
        train_adapters: Whether the active adapter of a base that PEFT wraps trains beside the side network, through the
            features that it changes. The layers before the first that it adapts run without gradients all the same,
            so that one in the last layers keeps most of the memory that is saved.
        backbone_dtype: What the frozen backbone is brought to when the side network is put beside it: `"bfloat16"`, all
            of it; `"int8"` or `"nf4"`, the weights of its linear layers, dequantised for each product, at 1 or 0.5625
            bytes each; nf4 needs bitsandbytes (`pip install 'fastpeft[nf4]'`). Embeddings, norms and biases then keep
            the dtype they were loaded in, in which the backbone goes on to compute. None leaves all as it is.
        base_model_name_or_path, base_revision, base_class: Filled in: what the side network was trained on.
        base_fingerprints: Filled in when saving: what some weights of the backbone were.

    Raises:
        FastpeftError: an argument is out of its range.

    Example:
        >>> LadderConfig(window_size=5).window_size
        5
    """

    model_type = SIDE_NETWORK

    def __init__(
        self,
        window_size: int = 9,
        reduction_factor: int = 8,
        feature_dropout: float | None = None,
        fusion: Fusion = "cross_attention",
        num_heads: int = 1,
        residual: bool = False,
        side_heads: int | None = None,
        init: Init = "random",
        layer_drop: float = 0.0,
        share_projections: bool = False,
        output_mix: bool = False,
        feature_modules: Sequence[str] | str | None = None,
        feature_sizes: Sequence[int] | None = None,
        causal: bool | None = None,
        train_adapters: bool = False,
        backbone_dtype: BackboneDtype | None = None,
        base_model_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_class: str | None = None,
        base_fingerprints: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.window_size = window_size
        self.reduction_factor = reduction_factor
        self.feature_dropout = feature_dropout
        self.fusion = fusion
        self.num_heads = num_heads
        self.residual = residual
        self.side_heads = side_heads
        self.init = init
        self.layer_drop = layer_drop
        self.share_projections = share_projections
        self.output_mix = output_mix
        self.feature_modules = [feature_modules] if isinstance(feature_modules, str) else feature_modules
        self.feature_sizes = list(feature_sizes) if isinstance(feature_sizes, Sequence) else feature_sizes
        self.causal = causal
        self.train_adapters = train_adapters
        self.backbone_dtype = backbone_dtype
        self.base_model_name_or_path = base_model_name_or_path
        self.base_revision = base_revision
        self.base_class = base_class
        self.base_fingerprints = dict(base_fingerprints or {})
        self._check()
        super().__init__(**kwargs)

    @property
    def dropout(self) -> float:
        """The probability of feature dropout that `feature_dropout` means."""
        if self.feature_dropout is not None:
            return self.feature_dropout
        return _WIDE_WINDOW_DROPOUT if self.window_size >= _WIDE_WINDOW else 0.0

    def _check(self) -> None:
        for name in ("window_size", "reduction_factor", "num_heads", "side_heads"):
            value = getattr(self, name)
            if name == "side_heads" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FastpeftError(f"{name}={value!r}; give a whole number from 1.")
        if self.window_size % 2 == 0 or self.window_size > MAX_WINDOW:
            raise FastpeftError(
                f"window_size={self.window_size}; a window is centred at a layer and holds at most {MAX_WINDOW} "
                "features. Give an odd number from 1, such as 9."
            )
        if self.feature_dropout is not None and not 0 <= self.feature_dropout < 1:
            raise FastpeftError(
                f"feature_dropout={self.feature_dropout!r}; give a probability from 0 to below 1, or None."
            )
        if not 0 <= self.layer_drop < 1:
            raise FastpeftError(f"layer_drop={self.layer_drop!r}; give a probability from 0 to below 1.")
        for name, values in (("fusion", get_args(Fusion)), ("init", get_args(Init))):
            if getattr(self, name) not in values:
                raise FastpeftError(f"{name}={getattr(self, name)!r}; allowed are {' and '.join(map(repr, values))}.")
        if self.fusion == "gated" and (self.window_size != 1 or self.num_heads != 1 or self.residual):
            raise FastpeftError(
                f"fusion='gated' with window_size={self.window_size}, num_heads={self.num_heads} and "
                f"residual={self.residual}: a gate mixes one feature, without attention. Give window_size=1 and leave "
                "num_heads and residual out, or use fusion='cross_attention'."
            )
        check_backbone_dtype(self.backbone_dtype)
        if self.backbone_dtype is not None and self.train_adapters:
            raise FastpeftError(
                f"backbone_dtype={self.backbone_dtype!r} with train_adapters=True (siva_layers): an adapter trains on "
                "the weights it was made for. Leave out either; the base itself may be loaded in bfloat16."
            )
        sizes = self.feature_sizes
        if sizes is not None and not (
            isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
        ):
            raise FastpeftError(f"feature_sizes={sizes!r}; give a list of whole numbers from 1, or None.")
        if self.feature_modules is not None and not self.feature_modules:
            raise FastpeftError("feature_modules is empty; name the backbone's layers, or give None to find them.")
