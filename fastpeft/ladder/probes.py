"""What a pass over a few tokens tells of a base: whether its tokens see later ones, and what its answer comes from."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastpeft.errors import FastpeftError, first_line
from fastpeft.ladder.backbone import Backbone, parameters_of
from fastpeft.ladder.backbone_passes import IdleLayersError, features_of, listen
from fastpeft.support.eval_mode import in_eval_mode

logger = logging.getLogger(__name__)

_TOKENS = 4
_CHARACTERS = 128
_CHANGED = 2  # the token, from 0, that is changed
_PIXELS = 64  # the side of an image, where a model takes any

# A change of earlier tokens is rounding up to this share of the change of later tokens. Measured over the 147
# architectures of transformers in float32, bfloat16 and float16: those whose tokens see later ones are above 0.6, all
# others at 0, or below 2e-6 where experts group tokens in another way.
_SAME_FEATURE = 0.1

# Answers to two texts that differ by less than this share of the largest are the same but for rounding. Measured over
# all architectures of transformers with heads for classes, tags, answers and words, in float32 and bfloat16: 0 where
# the last layer's output decides all, and above 0.4 where it does not.
_SAME_ANSWER = 0.05


def decide_causal(backbone: Backbone, given: bool | None) -> bool | None:
    """Whether each token of a side network sees only those before it, as in its backbone.

    A pass over two texts of four tokens tells: in a causal backbone, a changed token changes no feature of an earlier
    token. The pass runs in evaluation mode without gradients, and leaves random states and modes as they were. There is
    no pass if the backbone has no values (on the meta device) or reads no tokens; then the model's task and its
    layers' `is_causal` tell.

    Args:
        backbone: the model that the side network reads.
        given: the configuration's `causal`.

    Returns:
        True or False; None if nothing tells, for a module that is not a transformers model.

    Raises:
        FastpeftError: the model predicts next tokens, but its tokens see later ones or would by `given`; or the pass
            fails and `given` is None; or layers do not run in it; or it is the decoder of an encoder-decoder.
    """
    kind, predicts = backbone.class_name, predicts_next_tokens(backbone)
    if _reads_decoder_of_words(backbone):
        raise FastpeftError(
            f"the side network would read the decoder of the {kind}, which reads other tokens than its encoder: the "
            "attention_mask is that of the encoder's. Name the encoder's layers in feature_modules, or load a decoder "
            "alone by AutoModelForCausalLM."
        )
    if given is not None and not predicts:
        return given
    try:
        shown = _shown(backbone, predicts)
    except IdleLayersError:  # of other layers there is nothing to tell
        raise
    except Exception as error:  # a model that needs other inputs raises almost any type
        if given is None and predicts:
            raise FastpeftError(
                f"whether tokens of the {kind} see later ones cannot be told: a pass over {_TOKENS} tokens failed: "
                f"{first_line(error)} Fix that, or give LadderConfig(causal=True) if the layers that the side network "
                "reads predict next tokens, causal=False if not."
            ) from error
        return _declares_causal(backbone) if given is None else given
    if not predicts:
        return _declares_causal(backbone) if shown is None else shown
    if shown is False:
        raise FastpeftError(
            f"tokens of the {kind} see later ones, but it predicts each token from those before: it and a side network "
            "would see what they predict. Load it with a configuration that makes it a decoder, such as BERT's "
            "is_decoder=True, or with the head of another task."
        )
    if given is False:
        raise FastpeftError(
            f"causal=False beside a {kind}, which predicts each token from those before: the side network would see "
            "the tokens that it predicts. Leave causal out. If a side network was trained so, train it again."
        )
    return True


def check_causal(causal: bool | None, base: nn.Module, logits: Any, read: tuple[int, int] | None) -> None:
    """Raise `FastpeftError` if a module answers for each token and `causal` is unknown: it may predict next tokens.

    Args:
        causal: the configuration's.
        base: the module.
        logits: what it returned.
        read: B and T of its features, where answers may be `(B, T)`, as forecasts are, or `(B T, classes)`.
    """
    if causal is not None or not isinstance(logits, Tensor):
        return
    rows, tokens = read or (0, 0)
    for_each = tokens > 1 and (logits.shape == read or logits.shape[:1] == (rows * tokens,))
    if logits.ndim == 3 or for_each:
        raise FastpeftError(
            f"the base, a {type(base).__name__}, returned logits {tuple(logits.shape)}. Give LadderConfig(causal=True) "
            "if it predicts next tokens, causal=False if its tokens may see later ones."
        )


def check_answers(backbone: Backbone) -> None:
    """Raise `FastpeftError` if a base's answer depends on its input in other ways than by its last layer's output.

    A side network replaces that output. In a pass over two texts or images both get that of the first, and then the
    answers must be the same, unless they differ for equal rows too, as those of ViTMAE, which draws the patches that it
    reads. There is no pass if the base has no values (on the meta device), is not a transformers model, or has a
    decoder too, which reads the text again.
    """
    core, of_images = backbone.core, backbone.input_name == "pixel_values"
    if backbone.plain or (backbone.encodes_and_decodes and not of_images) or not _has_values(core):
        return
    passed_by = False
    for given in _two_inputs(backbone, of_images):
        try:
            passed_by = _passes_by(backbone, given)
        except IdleLayersError:
            raise
        except Exception:  # a model that needs other inputs raises almost any type; its own pass then tells of it
            continue
        break
    if passed_by:
        raise FastpeftError(
            f"{_not_alone(backbone)}, which a side network would replace: what else it reads would pass the side "
            "network by. Name in feature_modules whole layers, each of which reads the output of the one before, or "
            "load a model of another architecture."
        )


def warn_of_other_ways(backbone: Backbone, inputs: Any) -> bool:
    """Warn if a module's answer depends on `inputs` in other ways than by its last layer's output; see `check_answers`.

    It is no error: a module may be meant so, as one that gives a series its mean again.

    Returns:
        False where the inputs are of one row, which cannot tell: ask again.
    """
    several = dist.is_available() and dist.is_initialized()  # which have rows of their own, and as many passes
    if several or not isinstance(inputs, Tensor) or inputs.ndim == 0 or not _has_values(backbone.core):
        return True
    if len(inputs) < 2 or inputs[0].equal(inputs[-1]):
        return False
    try:
        passed_by = _passes_by(backbone, {"inputs": inputs})
    except Exception:  # of two rows some modules make others
        return True
    if passed_by:
        logger.warning(
            "%s, which the side network replaces: what else it reads passes the side network by, as it does where a "
            "head adds up all layers (use_weighted_layer_sum) or a network has skips. Unless that is meant, name other "
            "layers in feature_modules, or let the head read the last one alone",
            _not_alone(backbone),
        )
    return True


def predicts_next_tokens(backbone: Backbone) -> bool:
    """Whether a decoder alone generates text, by its class: it has `generate` and is not for masked words."""
    masked = backbone.class_name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
    return _has_generate(backbone) and not backbone.encodes_and_decodes and not masked


def _reads_decoder_of_words(backbone: Backbone) -> bool:
    """Whether the layers are those of a decoder that generates text from what an encoder has read."""
    return _has_generate(backbone) and backbone.encodes_and_decodes and backbone.encoder is None


def _has_generate(backbone: Backbone) -> bool:
    return not backbone.plain and bool(backbone.core.can_generate())


def _declares_causal(backbone: Backbone) -> bool | None:
    """What the configuration and the layers declare."""
    if any(getattr(module, "is_causal", False) for layer in backbone.layers for module in layer.modules()):
        return True
    return None if backbone.plain else bool(getattr(backbone.core.config, "is_decoder", False))


def _shown(backbone: Backbone, predicts: bool) -> bool | None:
    """Whether a pass shows causal features; None if no pass is possible, or no token changes another."""
    core = backbone.core
    if not _has_values(core):
        return None
    if not predicts and backbone.input_name != "input_ids":
        return None
    with _leaving_no_trace(backbone):
        features = features_of(backbone, {"input_ids": _two_texts(backbone, _CHANGED)})
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


def _two_texts(backbone: Backbone, changed: int | slice) -> Tensor:
    """Token ids of two texts of ordinary words that differ in the tokens `changed`, `(2, 4)`."""
    embeddings: Any = backbone.input_embeddings
    count = _CHARACTERS if embeddings is None else getattr(embeddings, "num_embeddings", None) or len(embeddings.weight)
    ids = (torch.arange(_TOKENS, device=backbone.device).repeat(2, 1) + count // 2) % count
    ids[1, changed] = (ids[1, changed] + 1) % count
    return ids


def _two_inputs(backbone: Backbone, of_images: bool) -> Iterator[dict[str, Tensor]]:
    """Inputs of two rows that differ: texts or images; where texts are not enough, images beside one text.

    Small images come before those of the size that the configuration names, which cost more.
    """
    core: Any = backbone.core
    kind: Any = type(core)
    if not of_images:
        yield {"input_ids": _two_texts(backbone, slice(None))}
    if "pixel_values" not in parameters_of(kind):
        return
    beside = {} if of_images else {"input_ids": _two_texts(backbone, slice(0))}
    parts = [core.config, *(getattr(core.config, name, None) for name in ("vision_config", "backbone_config"))]
    named = [size for part in parts if (size := getattr(part, "image_size", None))]
    channels = next((count for part in parts if (count := getattr(part, "num_channels", None))), 3)
    for size in (_PIXELS, *named[:1]):
        shape = (size, size) if isinstance(size, int) else size
        noise = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(0))
        yield {**beside, "pixel_values": noise.to(backbone.device, core.dtype)}


def _not_alone(backbone: Backbone) -> str:
    """What is wrong where an answer depends on more than the last layer's output."""
    core = backbone.core
    last = next(name for name, module in core.named_modules() if module is backbone.layers[-1])
    return f"the answer of the {backbone.class_name} comes not from the output of {last} alone"


def _passes_by(backbone: Backbone, given: Mapping[str, Tensor]) -> bool:
    """Whether an answer depends on more than the last layer's output, by the first and the last row of `given`."""
    return _answers_differ(backbone, given, [0, -1]) and not _answers_differ(backbone, given, [0, 0])


def _answers_differ(backbone: Backbone, given: Mapping[str, Tensor], rows: list[int]) -> bool:
    """Whether answers to two rows of `given` differ, where both get the first one's output of the last layer."""
    core: Any = backbone.core
    kind: Any = type(core)
    chosen = {name: value[rows] for name, value in given.items()}
    reads = True  # whether the layers read what differs: beside one text those of images do

    def replaced(feature: Tensor) -> Tensor:
        nonlocal reads
        if backbone.plain and len(feature) != 2:
            raise ValueError("the rows of a feature are not those of the inputs")
        of_first, of_second = feature.chunk(2)  # each perhaps several rows, as of the patches of MobileViT
        reads = len(given) == 1 or not of_first.equal(of_second)
        return torch.cat((of_first, of_first))

    with _leaving_no_trace(backbone), listen(backbone, lambda *_: None, replaced):
        if backbone.plain:
            outputs = {"logits": core(chosen["inputs"])}
        else:
            arguments: dict[str, Any] = backbone.arguments(chosen)
            if "interpolate_pos_encoding" in parameters_of(kind):
                arguments["interpolate_pos_encoding"] = True  # for images of any size
            outputs = core(**arguments, return_dict=True)
    # (2, ...), such as classes and boxes; else the first, but for a loss, by which routers balance their experts
    tensors = {name: value for name, value in outputs.items() if isinstance(value, Tensor) and value.ndim}
    answers = [value for name, value in tensors.items() if "logits" in name or name.startswith("pred")]
    for answer in (each.float() for each in answers or list(tensors.values())[:1]):
        if reads and (answer[0] - answer[1]).abs().max() > _SAME_ANSWER * answer.abs().max():
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
            for module, attention in sparse:  # on a short text BigBird changes to full attention for good
                module.set_attention_type(attention)
