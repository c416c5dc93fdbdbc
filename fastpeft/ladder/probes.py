"""What a pass over a few tokens tells of a base: whether its tokens see later ones, and what its answer comes from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from fastpeft.errors import FastpeftError, first_line
from fastpeft.ladder.backbone import Backbone
from fastpeft.ladder.backbone_passes import IdleLayersError, features_of, listen
from fastpeft.support.dropout import dropout_off

_TOKENS = 4
_CHARACTERS = 128
_CHANGED = 2  # the token, from 0, that is changed

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
    kind, predicts = type(backbone.core).__name__, predicts_next_tokens(backbone)
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


def check_told(causal: bool | None, base: nn.Module, logits: Any, read: tuple[int, int] | None) -> None:
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
    """Raise `FastpeftError` if a base's answer depends on its text in other ways than by its last layer's output.

    A side network replaces that output. In a pass over two texts both get that of the first, and then the answers must
    be the same. There is no pass if the base has no values (on the meta device), reads no tokens, or has a decoder too,
    which reads the text again.
    """
    core = backbone.core
    if backbone.plain or backbone.input_name != "input_ids" or backbone.encodes_and_decodes or not _has_values(core):
        return
    try:
        given = backbone.arguments({"input_ids": _two_texts(backbone, slice(None))})
        with _leaving_no_trace(backbone), listen(backbone, lambda *_: None, lambda feature: feature[[0, 0]]):
            outputs = core(**given, return_dict=True).values()
            # (2, ...); first may be a loss, by which routers balance their experts
            answers = next(each.float() for each in outputs if not isinstance(each, Tensor) or each.ndim)
    except IdleLayersError:
        raise
    except Exception:  # a model that needs other inputs raises almost any type; its own pass then tells what is wrong
        return
    if (answers[0] - answers[1]).abs().max() > _SAME_ANSWER * answers.abs().max():
        names = {module: name for name, module in core.named_modules()}
        raise FastpeftError(
            f"the answer of the {type(core).__name__} comes not from the output of {names[backbone.layers[-1]]} alone, "
            "which a side network would replace: what else it reads would pass the side network by. Name in "
            "feature_modules whole layers, each of which reads the output of the one before, or load a model of "
            "another architecture."
        )


def predicts_next_tokens(backbone: Backbone) -> bool:
    """Whether a decoder alone generates text, by its class: it has `generate` and is not for masked words."""
    if not _has_generate(backbone) or backbone.encodes_and_decodes:
        return False
    return type(backbone.core).__name__ not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def _reads_decoder_of_words(backbone: Backbone) -> bool:
    """Whether the layers are those of a decoder that generates text from what an encoder has read."""
    if not _has_generate(backbone) or not backbone.encodes_and_decodes:
        return False
    return backbone.encoder is None


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


@contextlib.contextmanager
def _leaving_no_trace(backbone: Backbone) -> Iterator[None]:
    """Run the block in evaluation mode, without gradients or compilation, and restore random states and modes."""
    core = backbone.core
    devices = {parameter.device.index for parameter in core.parameters() if parameter.device.type == "cuda"}
    sparse = [(module, module.attention_type) for module in core.modules() if hasattr(module, "set_attention_type")]
    with torch.random.fork_rng(devices):
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), dropout_off(core.modules()):
                yield
        finally:
            for module, attention in sparse:  # on a short text BigBird changes to full attention for good
                module.set_attention_type(attention)
