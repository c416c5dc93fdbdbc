"""A pretrained model as the side network sees it: its layers, the widths of its features, and its head."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from fastpeft.errors import FastpeftError
from fastpeft.models import TOKENS_FIRST

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # names in configurations
POOLER = "pooler"  # a module of this name inside the body runs after the layers, and trains

_OF_TAGS = set(MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values())
_OF_TOKENS = {
    *MODEL_FOR_PRETRAINING_MAPPING_NAMES.values(),
    *_OF_TAGS,
    *MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(),
}

# the inputs of a text model that decide its features
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
CACHES = ("past_key_values", "cache")  # what decoders call their cache, before transformers 5.24 and from then on
CACHE = CACHES["cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters]
# left out where a model does not know them
_OPTIONAL = ("token_type_ids", "logits_to_keep", "cache_position", "output_router_logits")


class Backbone:
    """A model taken apart into layers and head. It holds references and changes nothing.

    A model of `AutoModel` has no head: its pooler is frozen too.

    Args:
        model: a transformers model, or PEFT's wrapper of one.
        feature_modules: names of the layers. None finds them.

    Attributes:
        core: the model without PEFT's wrapper.
        class_name: what the core's class is called, for messages.
        headless: whether the core has no head, and answers with hidden states.
        body: the core without its head.
        context: tokens that stand in front of every text, a `fastpeft.ladder.context.Context`; None for none.
        layers: the L modules whose outputs are the features `B_1 .. B_L`. The first layer's input is `B_0`.

    Raises:
        FastpeftError: the head cannot be told from the body, the layers are not found, or the model reads or makes what
            is not of the form `(B, T)`.
    """

    def __init__(self, model: nn.Module, feature_modules: Sequence[str] | None = None) -> None:
        core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        if not isinstance(core, PreTrainedModel):
            raise FastpeftError(
                f"the base is a {type(core).__name__}; give a transformers model, such as one of "
                "AutoModelForSequenceClassification. A module of your own becomes one as a subclass of PreTrainedModel."
            )
        self.model = model
        self.core = core
        self.class_name = type(core).__name__
        self.body: nn.Module = _body_of(core)
        self.headless = self.body is core
        if self.headless and not _has_one_stack(core):
            raise FastpeftError(
                f"{type(core).__name__} has no head separate from its body. {_model_with_a_head(core.config)}"
            )
        _check_reads_rows(core)
        self.context: Any = None
        self.hooks: Any = None  # of `fastpeft.ladder.passes`
        self.probed: Any = None  # a `fastpeft.ladder.probe.Probe`
        self.tuple_size: int | None = None  # length of the tuple that a layer returns, 0 for a tensor; None: unknown
        self.layers = self._find_layers() if feature_modules is None else self._named_layers(feature_modules)

    def _find_layers(self) -> list[nn.Module]:
        """The largest list of modules of one class: a transformer's blocks."""
        kind, config = self.class_name, self.text_config
        lists = self._module_lists()
        if getattr(config, "is_encoder_decoder", False):
            stacks = [name for name in lists if not any(map(str.isdigit, name.split(".")))]
            raise FastpeftError(
                f"{kind} has an encoder and a decoder; name the layers of one of them in feature_modules: "
                f"{' or '.join(map(repr, stacks))}."
            )
        if config is not self.core.config:  # beside them are the layers of another part, perhaps larger ones
            inside = set(self.core.get_decoder().modules())
            lists = {name: blocks for name, blocks in lists.items() if inside.issuperset(blocks)} or lists
        mixed = {name: blocks for name, blocks in lists.items() if len(set(map(type, blocks))) > 1}
        lists = {name: blocks for name, blocks in lists.items() if len(set(map(type, blocks))) == 1}
        size = {name: sum(p.numel() for block in blocks for p in block.parameters()) for name, blocks in lists.items()}
        name = max(lists, key=lambda name: size[name], default=None)
        expected = getattr(config, "num_hidden_layers", None)
        if name is None or (expected is not None and len(lists[name]) != expected):
            raise FastpeftError(
                f"the layers of {kind} are not found: its lists of modules of one class are {_lengths(lists)}, of "
                f"several classes {_lengths(mixed)}, and its configuration says {expected} layers. Name in "
                "feature_modules layers that run once each, in their order; layers that a model runs several times "
                "cannot be read."
            )
        return lists[name]

    def _named_layers(self, names: Sequence[str]) -> list[nn.Module]:
        modules = dict(self.core.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise FastpeftError(
                f"feature_modules names {', '.join(map(repr, unknown))}, which {self.class_name} does not "
                f"have. Its lists of modules are {_lengths(self._module_lists())}; name one, or modules of "
                "model.named_modules()."
            )
        layers = [modules[name] for name in names]
        if len(layers) == 1 and isinstance(layers[0], nn.ModuleList | nn.Sequential):
            return list(layers[0])
        return layers

    def _module_lists(self) -> dict[str, list[nn.Module]]:
        return {name: list(part) for name, part in self.core.named_modules() if isinstance(part, nn.ModuleList)}

    def layer_of(self, parameters: Iterable[nn.Parameter]) -> int:
        """The first layer, from 1, that holds one of `parameters`; 0 if a parameter is before the layers."""
        left = {id(parameter) for parameter in parameters}
        first = len(self.layers) + 1
        for number in range(len(self.layers), 0, -1):
            if inside := {id(parameter) for parameter in self.layers[number - 1].parameters()} & left:
                first, left = number, left - inside
        return 0 if left else first

    @property
    def hidden_size(self) -> int:
        """The width d of all features, from the configuration, or else from the first matrix of the layers."""
        named: int | None = getattr(self.text_config, "hidden_size", None)
        return named or next(each.shape[-1] for each in self.layers[0].parameters() if each.ndim > 1)

    @property
    def encodes_and_decodes(self) -> bool:
        """Whether a transformers model has an encoder and a decoder, by its configuration or that of its text."""
        config: Any = self.core.config
        of_itself: bool = getattr(config, "is_encoder_decoder", False)
        return of_itself or getattr(config.get_text_config(), "is_encoder_decoder", False)

    @property
    def encoder(self) -> nn.Module | None:
        """The encoder of a model that has a decoder too, if the layers are the encoder's; else None."""
        if not self.encodes_and_decodes:
            return None
        encoder: nn.Module = self.core.get_encoder()
        return encoder if self.layers[0] in set(encoder.modules()) else None

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.core.parameters()), torch.device("cpu"))

    @property
    def input_name(self) -> str:
        """The name of the input in `LadderModel.forward`."""
        name: str = self.core.main_input_name
        return name

    @property
    def input_embeddings(self) -> nn.Module | None:
        """The module of its input's embeddings, None where it names none: images may have none, characters several."""
        try:
            embeddings: nn.Module = self.core.get_input_embeddings()
        except NotImplementedError:
            return None
        return embeddings

    @property
    def text_config(self) -> Any:
        """The configuration of what reads or writes text, which is only a part where a model sees or hears too.

        Of an encoder-decoder it is the whole one, since both stacks have to do with text.
        """
        config: Any = self.core.config
        text = self.input_name == "input_ids" or self.core.can_generate()
        return config.get_text_config() if text and not getattr(config, "is_encoder_decoder", False) else config

    @property
    def frozen(self) -> list[nn.Module]:
        """The modules that are not part of the head: they stay in evaluation mode, and their parameters are frozen."""
        modules = list(self.body.modules())
        if self.headless:
            return modules
        # a pooler is inside the body, but runs after the layers and belongs to the head
        poolers = [module for name, module in self.body.named_modules() if name.rpartition(".")[2] == POOLER]
        pooled = {id(module) for pooler in poolers for module in pooler.modules()}
        return [module for module in modules if id(module) not in pooled]

    @property
    def decoder(self) -> nn.Linear | None:
        """The layer of the head that scores the words of the vocabulary, if there is one."""
        decoder = self.core.get_output_embeddings()
        words = getattr(self.text_config, "vocab_size", None)
        return decoder if isinstance(decoder, nn.Linear) and decoder.out_features == words else None

    @property
    def answers_tokens(self) -> bool:
        """Whether there is an answer for each token: a word, a tag, whether an answer begins or ends, or a state."""
        return self.headless or self.decoder is not None or bool(self._kinds & _OF_TOKENS)

    @property
    def tags(self) -> bool:
        """Whether there is a tag for each token."""
        return bool(self._kinds & _OF_TAGS)

    @property
    def _kinds(self) -> set[str]:
        return {kind.__name__ for kind in type(self.core).__mro__}

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the head, without a decoder to the vocabulary, by the model's names: these train."""
        decoder = self.decoder_parameters()
        return {name: parameter for name, parameter in self._after_layers().items() if name not in decoder}

    def decoder_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the head's decoder to the vocabulary, by the model's names, but for those of embeddings.

        Another matrix with a side of all words is a part of it, as where embeddings are narrower than states.
        """
        if self.decoder is None:
            return {}
        own, words = {id(parameter) for parameter in self.decoder.parameters()}, self.decoder.out_features
        return {
            name: parameter
            for name, parameter in self._after_layers().items()
            if id(parameter) in own or (parameter.ndim == 2 and [*parameter.shape].count(words) == 1)
        }

    def _after_layers(self) -> dict[str, nn.Parameter]:
        frozen = {id(parameter) for module in self.frozen for parameter in module.parameters(recurse=False)}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            # PEFT keeps the untrained original of a separately saved head
            if id(parameter) not in frozen and ".original_module." not in name
        }

    def head_buffers(self) -> list[str]:
        """The names of the head's saved buffers, such as the running statistics of a norm."""
        frozen = {id(buffer) for module in self.frozen for buffer in module.buffers(recurse=False)}
        kept = self.model.state_dict().keys()
        return [name for name, buffer in self.model.named_buffers() if id(buffer) not in frozen and name in kept]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that PEFT's active adapter adds to the layers, by the model's names.

        Raises:
            FastpeftError: there is no adapter, or it is not named `default`.
        """
        prefix = getattr(getattr(self.model, "base_model", None), "prefix", None)  # of a tuner: "siva_", "lora_"
        found = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if prefix and f".{prefix}" in name and self.model.active_adapter in name.split(".")
        }
        if not found:
            raise FastpeftError(
                f"train_adapters=True, but the base, a {type(self.model).__name__}, has no adapter in its layers. Wrap "
                "it by peft.get_peft_model with a SivaConfig or another, or leave train_adapters out."
            )
        if self.model.active_adapter != "default":  # PEFT saves others in a folder of their name
            raise FastpeftError(
                f"train_adapters=True with the adapter {self.model.active_adapter!r}: beside a side network it is "
                "saved as 'default'. Give it that name, which is the default of get_peft_model."
            )
        return found

    def adapter_modules(self) -> set[nn.Module]:
        """The modules that PEFT's adapters are made of, such as their dropout, in the layers that they go onto."""
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        of_base = {module for layer in layers for module in layer.get_base_layer().modules()}
        return {module for layer in layers for module in layer.modules()} - of_base

    def arguments(self, given: Mapping[str, Any], part: nn.Module | None = None) -> dict[str, Any]:
        """Arguments for the model or a part of it: no None, and of the optional ones those that it knows."""
        accepted = parameters_of(self.core if part is None else part)
        chosen = {
            name: value
            for name, value in given.items()
            if value is not None and (name not in _OPTIONAL or name in accepted)
        }
        # a model may have a cache and take `use_cache` without naming it, to hand it on
        return chosen if accepted.isdisjoint(("use_cache", *CACHES)) else {"use_cache": False, **chosen}

    def after_context(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a pass over texts, those of the same texts after the context, if there is one.

        Call it before layers are listened to: the context may have to be read first.
        """
        return arguments if self.context is None else self.context.in_front(arguments)

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `run_body`: those of `given` that decide the features of a text model."""
        return self.arguments({name: given[name] for name in INPUTS if name in given}, self.encoder or self.body)


def parameters_of(module: nn.Module) -> frozenset[str]:
    """The names that the forward of a module's class takes."""
    kind: Any = type(module)
    return _parameters_of(kind)


@functools.cache
def _parameters_of(kind: Any) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def activation_of(config: Any) -> str:
    """The name of the activation function; GELU if the configuration names none that transformers knows."""
    named = (getattr(config, name, None) for name in _ACTIVATIONS)
    return next((name for name in named if isinstance(name, str) and name in ACT2FN), "gelu")


def _check_reads_rows(core: PreTrainedModel) -> None:
    """Raise `FastpeftError` where a model does not make features `(B, T, d)` of inputs that a `LadderModel` takes."""
    kind, input_name = type(core).__name__, core.main_input_name
    if input_name not in ("input_ids", "pixel_values"):
        raise FastpeftError(
            f"the base, a {kind}, reads {input_name}; beside a side network a transformers model reads input_ids or "
            "pixel_values. Load a model of text or of images."
        )
    if kind in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        raise FastpeftError(
            f"the base, a {kind}, reads several texts a row, (B, choices, T); a side network reads one, (B, T). Load "
            "it with AutoModelForSequenceClassification and one label, and score each choice by itself."
        )
    if core.config.model_type in TOKENS_FIRST:
        raise FastpeftError(
            f"the features of the base, a {kind}, are (T, B, d), and a side network reads (B, T, d): it would mix the "
            "rows up. Load a model of another architecture."
        )


def _body_of(core: PreTrainedModel) -> PreTrainedModel:
    """The model without its head; itself where that cannot be told.

    A few name another as their body than they have: theirs is the one model inside.
    """
    if _has_one_stack(core):  # also one whose encoder has the name of a body
        return core
    inside = [child for child in core.children() if isinstance(child, PreTrainedModel)]
    return inside[0] if core.base_model is core and len(inside) == 1 else core.base_model


def _has_one_stack(core: PreTrainedModel) -> bool:
    """Whether the output of the layers is what the model is for: it is one of `AutoModel` with a single stack."""
    name = type(core).__name__
    names = (*MODEL_MAPPING_NAMES.values(), *MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.values())
    compares = "return_loss" in parameters_of(core)  # texts with images or sound
    one_stack = not getattr(core.config, "is_encoder_decoder", False) and not compares
    return one_stack and any(name in ((each,) if isinstance(each, str) else each) for each in names)


def _model_with_a_head(config: Any) -> str:
    """Advice: which model to load in place of one whose head cannot be told from its body."""
    heads = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)
    if named := [classes[type(config)].__name__ for classes in heads if type(config) in classes]:
        return f"Load the model with {' or '.join(named)}."
    if getattr(config, "is_encoder_decoder", False):
        return f"Transformers has no classifier of the kind {config.model_type}. Load a model of another architecture."
    if hasattr(config, "text_config") and hasattr(config, "vision_config"):
        return "It has a stack for texts and one for images: load the model of one of them."
    if hasattr(config, "text_config") and hasattr(config, "audio_config"):
        return "It has a stack for texts and one for sound: load the model of one of them."
    return "Load the model with a class that has a head."


def _lengths(lists: Mapping[str, Sequence[nn.Module]]) -> str:
    return ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items()) or "none"
