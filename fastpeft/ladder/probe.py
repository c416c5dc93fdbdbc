"""What a backbone can do: facts of its class and configuration, and of one pass over three texts of four tokens."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastpeft.errors import FastpeftError, first_line
from fastpeft.ladder.backbone import CACHE, Backbone, parameters_of
from fastpeft.ladder.config import STATE, LadderConfig, Residual
from fastpeft.ladder.inputs import tokens_of
from fastpeft.ladder.passes import IdleLayersError, features_of, listen
from fastpeft.support.eval_mode import in_eval_mode

logger = logging.getLogger(__name__)

_TOKENS = 4
_CHARACTERS = 128
_CHANGED = 2  # the token, from 0, that is changed in the second text
_PIXELS = 64  # the side of an image, where a model takes any

# A change of earlier tokens is rounding up to this share of the change of later tokens. Measured over the 147
# architectures of transformers in float32, bfloat16 and float16: those whose tokens see later ones are above 0.6, all
# others at 0, or below 2e-6 where experts group tokens in another way.
_SAME_FEATURE = 0.1

# Answers to two texts that differ by less than this share of the largest are the same but for rounding. Measured over
# all architectures of transformers with heads for classes, tags, answers and words, in float32 and bfloat16: 0 where
# the last layer's output decides all, and above 0.4 where it does not.
_SAME_ANSWER = 0.05


@dataclass(frozen=True)
class Probe:
    """What is known of a backbone.

    Attributes:
        predicts: whether it predicts next tokens, so that it generates text: a decoder alone, not for masked words.
        keeps_keys: whether it keeps the keys and values of tokens as its cache.
        passed: whether a pass was made; the rest is of that.
        causal: whether tokens see only those before them. Without a pass (values on the meta device, other inputs than
            tokens) the layers and the configuration tell; None if nothing does.
        passed_by: whether the answer depends on the input in other ways than by the last layer's output.
        failure: why a pass told nothing of `causal`; empty if it did, or there was none.
    """

    predicts: bool
    keeps_keys: bool
    passed: bool = False
    causal: bool | None = None
    passed_by: bool = False
    failure: str = ""


def probe(backbone: Backbone, *, by_pass: bool = False) -> Probe:
    """What is known of a backbone, each found once.

    Args:
        backbone: the model.
        by_pass: whether to make a pass, if there was none yet. It runs in evaluation mode without gradients, and leaves
            random states and modes as they were.

    Raises:
        FastpeftError: layers that are to be read do not run.
    """
    found: Probe | None = backbone.probed
    if found is None:
        generates = bool(backbone.core.can_generate())
        masked = backbone.class_name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
        predicts = generates and not backbone.encodes_and_decodes and not masked
        found = Probe(predicts, _keeps_keys(backbone))
    if by_pass and not found.passed:
        found = _after_pass(backbone, found)
    backbone.probed = found
    return found


def check_generates(backbone: Backbone) -> None:
    """Raise `FastpeftError` unless the model generates text."""
    if not probe(backbone).predicts:
        raise FastpeftError(
            f"the base, a {backbone.class_name}, does not generate text, so a side network beside it does not "
            "either. Allowed are decoders that predict next tokens: load the base by AutoModelForCausalLM."
        )


def decide_defaults(config: LadderConfig, backbone: Backbone) -> set[str]:
    """Fill in the fields whose default depends on the backbone or its head.

    Returns:
        The names of those that depend on the head and were filled in. None of their values adds a weight.
    """
    config.causal = decide_causal(backbone, config.causal)
    config.layers_per_block = config.step(len(backbone.layers))
    residual: Residual | None = config.residual
    if residual is None:
        # with the state tags are far better, and words a little worse
        residual = config.fusion == "cross_attention" and (STATE if backbone.tags else backbone.answers_tokens)
    defaults = {
        "output_mix": "add" if backbone.decoder is not None else False,
        "residual": residual,
        "normalise_features": bool(residual) or bool(config.causal),
    }
    decided = {field: value for field, value in defaults.items() if getattr(config, field) is None}
    for field, value in decided.items():
        setattr(config, field, value)
    return set(decided)


def decide_causal(backbone: Backbone, given: bool | None) -> bool | None:
    """Whether each token of a side network sees only those before it, as in its backbone; None if nothing tells.

    Args:
        backbone: the model that the side network reads.
        given: the configuration's `causal`.

    Raises:
        FastpeftError: the model predicts next tokens, but its tokens see later ones or would by `given`; or the pass
            fails and `given` is None; or layers do not run in it; or it is the decoder of an encoder-decoder.
    """
    kind, predicts = backbone.class_name, probe(backbone).predicts
    of_both = backbone.encodes_and_decodes and backbone.core.can_generate()
    if of_both and backbone.encoder is None:
        raise FastpeftError(
            f"the side network would read the decoder of the {kind}, which reads other tokens than its encoder: the "
            "attention_mask is that of the encoder's. Name the encoder's layers in feature_modules, or load a decoder "
            "alone by AutoModelForCausalLM."
        )
    if given is not None and not predicts:
        return given
    found = probe(backbone, by_pass=True)
    if found.failure and given is None and predicts:
        raise FastpeftError(
            f"whether tokens of the {kind} see later ones cannot be told: a pass over {_TOKENS} tokens failed: "
            f"{found.failure} Fix that, or give LadderConfig(causal=True) if the layers that the side network "
            "reads predict next tokens, causal=False if not."
        )
    if not predicts or found.failure:
        return found.causal if given is None else given
    if found.causal is False:
        raise FastpeftError(
            f"tokens of the {kind} see later ones, but it predicts each token from those before: it and a side network "
            "would see what they predict. Load it with a configuration that makes it a decoder (is_decoder=True), or "
            "with the head of another task."
        )
    if given is False:
        raise FastpeftError(
            f"causal=False beside a {kind}, which predicts each token from those before: the side network would see "
            "the tokens that it predicts. Leave causal out. If a side network was trained so, train it again."
        )
    return True


def check_answers(backbone: Backbone) -> None:
    """Raise `FastpeftError` if a base's answer depends on its input in other ways than by its last layer's output.

    A side network replaces that output.
    """
    if probe(backbone, by_pass=True).passed_by:
        raise FastpeftError(
            f"{_not_alone(backbone)}, which a side network would replace: what else it reads would pass the side "
            "network by. Name in feature_modules whole layers, each of which reads the output of the one before, or "
            "load a model of another architecture."
        )


def _keeps_keys(backbone: Backbone) -> bool:
    core: Any = backbone.core
    if CACHE not in parameters_of(core) or not isinstance(core, GenerationMixin):
        return False
    config = backbone.text_config
    if "num_attention_heads" not in {*config.to_dict(), *config.attribute_map}:  # recurrent alone: it has no keys
        return False
    # some keep states in their modules, which nothing reorders, and some a cache of their own
    own = any(hasattr(module, "_setup_cache") for module in core.modules())
    return not own and bool(core._supports_default_dynamic_cache())


def _after_pass(backbone: Backbone, found: Probe) -> Probe:
    """What a pass shows, in which the first row is as the second but for one token, and the third has other tokens."""
    core, of_images = backbone.core, backbone.input_name == "pixel_values"
    reads_text = backbone.input_name == "input_ids" or found.predicts
    features: list[Tensor] = []
    passed_by, failure, causal = False, "", None
    if _has_values(core):
        whole = of_images or not backbone.encodes_and_decodes  # a decoder reads the text again
        for given in _tiny_inputs(backbone, of_images) if whole else ():
            try:
                passed_by = _passes_by(backbone, given, features if given.keys() == {"input_ids"} else [])
            except IdleLayersError:
                raise
            except Exception:  # a model that needs other inputs raises almost any type; its own pass then tells of it
                continue
            break
        try:
            if reads_text and len(features) <= len(backbone.layers):  # without the head, which may need other inputs
                with _leaving_no_trace(backbone):
                    features = features_of(backbone, {"input_ids": _texts(backbone)})
            causal = _is_causal(features)
        except IdleLayersError:
            raise
        except Exception as error:
            failure = first_line(error)
    if causal is None and not (found.predicts and not failure):
        causal = _declares_causal(backbone)
    return replace(found, passed=True, causal=causal, passed_by=passed_by, failure=failure)


def _declares_causal(backbone: Backbone) -> bool:
    """What the configuration and the layers declare."""
    if any(getattr(module, "is_causal", False) for layer in backbone.layers for module in layer.modules()):
        return True
    return bool(getattr(backbone.core.config, "is_decoder", False))


def _is_causal(features: list[Tensor]) -> bool | None:
    """Whether a changed token changed no feature of an earlier one; None if it changed no other token at all."""
    before = after = 0.0  # the largest change of an earlier and of a later token, as shares of the changed token's
    for feature in features:
        change = (feature[0].float() - feature[1].float()).abs().amax(-1)  # (T,)
        if (own := change[_CHANGED].item()) > 0:
            before = max(before, change[:_CHANGED].max().item() / own)
            after = max(after, change[_CHANGED + 1 :].max().item() / own)
    if before > _SAME_FEATURE * after:
        return False
    return True if after > 0 else None


def _has_values(core: nn.Module) -> bool:
    """Whether a pass of a model computes numbers: it is not on the meta device, nor simulated."""
    return not any(parameter.is_meta or isinstance(parameter, FakeTensor) for parameter in core.parameters())


def _texts(backbone: Backbone) -> Tensor:
    """Token ids of three texts of ordinary words, `(3, 4)`: the second differs in one token, the third in all."""
    embeddings: Any = backbone.input_embeddings
    count = _CHARACTERS if embeddings is None else getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)
    ids = (torch.arange(_TOKENS, device=backbone.device).repeat(3, 1) + count // 2) % count
    ids[1, _CHANGED] = (ids[1, _CHANGED] + 1) % count
    ids[2] = (ids[2] + 1) % count
    return ids


def _tiny_inputs(backbone: Backbone, of_images: bool) -> Iterator[dict[str, Tensor]]:
    """Inputs whose last row differs from the first: texts or images; where texts fail, images beside one text.

    Small images come before those of the size that the configuration names, which cost more.
    """
    core: Any = backbone.core
    if not of_images:
        yield {"input_ids": _texts(backbone)}
    if "pixel_values" not in parameters_of(core):
        return
    beside = {} if of_images else {"input_ids": _texts(backbone)[[0, 0]]}
    parts = [core.config, *(getattr(core.config, name, None) for name in ("vision_config", "backbone_config"))]
    named = [size for part in parts if (size := getattr(part, "image_size", None))]
    channels = next((count for part in parts if (count := getattr(part, "num_channels", None))), 3)
    for size in (_PIXELS, *named[:1]):
        shape = (size, size) if isinstance(size, int) else size
        noise = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(0))
        yield {**beside, "pixel_values": noise.to(backbone.device, core.dtype)}


def _not_alone(backbone: Backbone) -> str:
    """What is wrong where an answer depends on more than the last layer's output."""
    last = next(name for name, module in backbone.core.named_modules() if module is backbone.layers[-1])
    return f"the answer of the {backbone.class_name} comes not from the output of {last} alone"


def _passes_by(backbone: Backbone, given: Mapping[str, Tensor], features: list[Tensor]) -> bool:
    """Whether an answer depends on more than the last layer's output, by the first and the last row of `given`.

    Of a model that draws at random what it reads, answers differ for equal rows too, which tells nothing. The list
    gets the features of `given`.
    """
    equal = {name: value[[0] * len(value)] for name, value in given.items()}
    return _answers_differ(backbone, given, features) and not _answers_differ(backbone, equal, [])


def _answers_differ(backbone: Backbone, given: Mapping[str, Tensor], features: list[Tensor]) -> bool:
    """Whether the answers to the first and the last row differ, where all get the first one's output of the layers."""
    core: Any = backbone.core
    rows = len(next(iter(given.values())))
    reads = True  # whether the layers read what differs: beside one text those of images do

    def replaced(feature: Tensor) -> Tensor:
        nonlocal reads
        parts = feature.chunk(rows)  # each perhaps several rows, as of the patches of an image
        reads = len(given) == 1 or not parts[0].equal(parts[-1])
        return torch.cat([parts[0]] * rows)

    tokens = tokens_of(given) if len(given) == 1 else None  # beside an image a text may grow
    with _leaving_no_trace(backbone), listen(backbone, lambda _, each: features.append(each), replaced, tokens):
        arguments: dict[str, Any] = backbone.arguments(given)
        if "interpolate_pos_encoding" in parameters_of(core):
            arguments["interpolate_pos_encoding"] = True  # for images of any size
        outputs = core(**arguments, return_dict=True)
    # (B, ...), such as classes and boxes; else the first, but for a loss, by which routers balance their experts
    tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.ndim}
    answers = [value for name, value in tensors.items() if "logits" in name or name.startswith("pred")]
    for answer in (each.float() for each in answers or list(tensors.values())[:1]):
        if reads and (answer[0] - answer[-1]).abs().max() > _SAME_ANSWER * answer.abs().max():
            return True
    return False


@contextlib.contextmanager
def _leaving_no_trace(backbone: Backbone) -> Iterator[None]:
    """Run the block in evaluation mode, without gradients or compilation, and restore random states and modes."""
    core = backbone.core
    devices = {parameter.device.index for parameter in core.parameters() if parameter.device.type == "cuda"}
    sparse = [(module, module.attention_type) for module in core.modules() if hasattr(module, "set_attention_type")]
    with torch.random.fork_rng(devices):
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), in_eval_mode(core.modules()):
                yield
        finally:
            for module, attention in sparse:  # some change from sparse to full attention for good on a short text
                module.set_attention_type(attention)
