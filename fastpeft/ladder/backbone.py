"""A pretrained model as the side network sees it: its stack of layers, its head, and what identifies its weights."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from fastpeft.errors import FastpeftError
from fastpeft.ladder.frozen import CompiledForward, conversion_of, is_quantised
from fastpeft.support.fingerprints import fingerprint, fingerprints_agree

logger = logging.getLogger(__name__)

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")  # names in configurations
POOLER = "pooler"  # the name of a module inside the body that comes after the layers, and trains

# what a body that reads text is given
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")

_CURE_OF_TEXT = (
    "Load the base with attn_implementation='sdpa', which keeps padding, without virtual tokens, and name in "
    "feature_modules only layers of the backbone's width."
)
_CURE = (
    "Name in feature_modules layers between which the number of tokens stays, H W for (B, C, H, W), and give in "
    "feature_sizes their widths where they were not found."
)


class Backbone:
    """A model with a head, taken apart. It holds references and changes nothing.

    Any module will do whose layers are named. The head of one that is no transformers model is what comes after the
    last of its layers in the order of its `modules()`, which of an `nn.Sequential` is the order in which they run.

    Args:
        model: a transformers model with a head, another module, or PEFT's wrapper of one.
        feature_modules: names of its layers, or None to find them in a transformers model.
        feature_sizes: widths of the features; see the property of that name.

    Attributes:
        core: the model without PEFT's wrapper.
        plain: whether it is no transformers model.
        body: the part of a transformers model without the head; of another module, all of it.
        layers: the L modules whose outputs are the features `B_1 .. B_L`; the first one's input is `B_0`.

    Raises:
        FastpeftError: it is no such model, or its layers are not found.
    """

    def __init__(
        self,
        model: nn.Module,
        feature_modules: Sequence[str] | None = None,
        feature_sizes: Sequence[int] | None = None,
    ) -> None:
        core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.plain = not isinstance(core, PreTrainedModel)
        if self.plain and (feature_modules is None or not isinstance(core, nn.Module)):
            raise FastpeftError(
                f"the base is a {type(core).__name__}; a side network goes beside a transformers model, or one that "
                "PEFT wraps: load it with AutoModelForSequenceClassification or another class with a head. Of another "
                "nn.Module, name the layers in feature_modules."
            )
        self.model = model
        self.core = core
        self.body: nn.Module = core if self.plain else core.base_model
        if self.body is core and not self.plain:
            raise FastpeftError(
                f"{type(core).__name__} has no head apart from its body that a side network could feed. "
                f"{_cure_of_headless(core.config)}"
            )
        self._given_sizes = feature_sizes
        self._tuple_size: int | None = None  # of what layers return, 0 for a tensor; learnt when one runs
        self.layers = self._find_layers() if feature_modules is None else self._named_layers(feature_modules)

    # -- layers --------------------------------------------------------------------------------------------------

    def _find_layers(self) -> list[nn.Module]:
        """The largest list of modules of one class: a transformer's blocks."""
        kind, config = type(self.core).__name__, self.core.config
        if getattr(config, "is_encoder_decoder", False):
            stacks = [
                name
                for name, module in self.core.named_modules()
                if isinstance(module, nn.ModuleList) and not any(map(str.isdigit, name.split(".")))
            ]
            raise FastpeftError(
                f"{kind} has an encoder and a decoder; name the layers of one of them in feature_modules: "
                f"{' or '.join(map(repr, stacks))}."
            )
        lists = {
            name: list(module)
            for name, module in self.core.named_modules()
            if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1
        }
        size = {name: sum(p.numel() for block in blocks for p in block.parameters()) for name, blocks in lists.items()}
        name = max(lists, key=lambda name: size[name], default=None)
        expected = getattr(config, "num_hidden_layers", None)
        if name is None or (expected is not None and len(lists[name]) != expected):
            found = f"its lists of like modules are {_lengths(lists)}" if lists else "it holds no list of like modules"
            raise FastpeftError(
                f"the layers of {kind} are not found: {found}, and its configuration says {expected} layers. Name "
                "them in feature_modules, in the order in which they run, each once; layers that a model runs several "
                "times, as ALBERT's, cannot be read."
            )
        return lists[name]

    def _named_layers(self, names: Sequence[str]) -> list[nn.Module]:
        modules = dict(self.core.named_modules())
        unknown = [name for name in names if name not in modules]
        if unknown:
            lists = {name: list(module) for name, module in modules.items() if isinstance(module, nn.ModuleList)}
            raise FastpeftError(
                f"feature_modules names {', '.join(map(repr, unknown))}, which {type(self.core).__name__} does not "
                f"have. Its lists of modules are {_lengths(lists) or 'none'}; name one, or modules such as "
                f"{next((f'{name}.0' for name in lists), 'those of model.named_modules()')!r}."
            )
        layers = [modules[name] for name in names]
        if len(layers) == 1 and isinstance(layers[0], nn.ModuleList):
            return list(layers[0])
        return layers

    # -- what it is ----------------------------------------------------------------------------------------------

    @functools.cached_property
    def feature_sizes(self) -> list[int]:
        """Widths of `B_0 .. B_L`: those given, the configuration's, or those of the first and last matrix of a layer.

        Raises:
            FastpeftError: more or fewer are given, or the layers hold no matrices.
        """
        count, given = len(self.layers) + 1, self._given_sizes
        if given is not None:
            if len(given) != count:
                raise FastpeftError(
                    f"feature_sizes names {len(given)} widths of {count} features: the input of the first layer and "
                    "the output of each. Give one for each, or None."
                )
            return list(given)
        if not self.plain and hasattr(self.core.config, "hidden_size"):
            return count * [self.core.config.hidden_size]
        matrices = [[p.shape for p in layer.parameters() if p.ndim > 1] for layer in self.layers]
        if not matrices[0]:
            raise FastpeftError(
                f"the widths of the features are not found: the first of feature_modules, a "
                f"{type(self.layers[0]).__name__}, holds no matrix. Give them in feature_sizes."
            )
        sizes = [matrices[0][0][1]]
        for shapes in matrices:
            sizes.append(shapes[-1][0] if shapes else sizes[-1])
        return sizes

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.core.parameters()), torch.device("cpu"))

    @property
    def input_name(self) -> str:
        """What `LadderModel.forward` calls the input."""
        name: str = "inputs" if self.plain else self.core.main_input_name
        return name

    @property
    def activation(self) -> str:
        """The name of its activation function, GELU where it names none that transformers knows."""
        config = getattr(self.core, "config", None)
        named = (getattr(config, name, None) for name in _ACTIVATIONS)
        return next((name for name in named if isinstance(name, str) and name in ACT2FN), "gelu")

    @property
    def poolers(self) -> list[nn.Module]:
        """Poolers inside the body of a transformers model: they come after the layers and belong to the head."""
        return [module for name, module in self.body.named_modules() if name.rpartition(".")[2] == POOLER]

    @property
    def frozen(self) -> list[nn.Module]:
        """The modules that are no part of the head: they stay in evaluation mode, and nothing of them trains."""
        modules = list(self.body.modules())
        if self.plain:
            places = {id(module): place for place, module in enumerate(modules)}
            return modules[: 1 + max(places[id(module)] for module in self.layers[-1].modules())]
        pooled = {id(module) for pooler in self.poolers for module in pooler.modules()}
        return [module for module in modules if id(module) not in pooled]

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """What trains of the model: its head, except a decoder to the vocabulary. Names are the model's."""
        frozen = {id(parameter) for module in self.frozen for parameter in module.parameters(recurse=False)}
        decoder = None if self.plain else self.core.get_output_embeddings()
        if isinstance(decoder, nn.Linear) and decoder.out_features == getattr(self.core.config, "vocab_size", None):
            frozen |= {id(parameter) for parameter in decoder.parameters()}
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            # PEFT keeps the untrained original of a separately saved head
            if id(parameter) not in frozen and ".original_module." not in name
        }

    def head_buffers(self) -> list[str]:
        """What its head keeps beside parameters, as the running statistics of a norm. Names are the model's."""
        frozen = {id(buffer) for module in self.frozen for buffer in module.buffers(recurse=False)}
        kept = self.model.state_dict().keys()
        return [name for name, buffer in self.model.named_buffers() if id(buffer) not in frozen and name in kept]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """What the active adapter of PEFT adds to the layers. Names are the model's.

        Raises:
            FastpeftError: there is none.
        """
        prefix = getattr(getattr(self.model, "base_model", None), "prefix", None)  # of a tuner: "siva_", "lora_"
        found = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if prefix and f".{prefix}" in name and self.model.active_adapter in name.split(".")
        }
        if found and self.model.active_adapter != "default":  # PEFT saves others in a folder of their name
            raise FastpeftError(
                f"train_adapters=True with the adapter {self.model.active_adapter!r}: beside a side network it is "
                "saved as 'default'. Give it that name, which get_peft_model does by itself."
            )
        if not found:
            raise FastpeftError(
                f"train_adapters=True, but the base, a {type(self.model).__name__}, has no adapter in its layers. Wrap "
                "it by peft.get_peft_model with a SivaConfig or another, or leave train_adapters out."
            )
        return found

    def layer_of(self, parameters: Iterable[nn.Parameter]) -> int:
        """The first layer, from 1, that holds one of `parameters`; 0 where one lies before the layers."""
        left = {id(parameter) for parameter in parameters}
        first = len(self.layers) + 1
        for number in range(len(self.layers), 0, -1):
            inside = {id(parameter) for parameter in self.layers[number - 1].parameters()} & left
            first, left = (number, left - inside) if inside else (first, left)
        return 0 if left else first

    # -- fingerprints --------------------------------------------------------------------------------------------

    def fingerprints(self, trained: Iterable[nn.Parameter] = (), *, whole: bool = False) -> dict[str, str]:
        """Fingerprints of the embedding, the first and the last layer; where weights are quantised there is none.

        Of a backbone that `convert` brought to another dtype they are those that it had before.

        Args:
            trained: parameters that change, as of an adapter, and are left out.
            whole: whether to leave out the parts that hold such too, for whose weights the adapter itself vouches.

        Of a module that is no transformers model there is one of all that is frozen, buffers included.
        """
        if (converted := conversion_of(self.core)) is not None:
            return dict(converted.fingerprints)
        changing = {id(parameter) for parameter in trained}
        if self.plain:
            own = [(module.parameters(recurse=False), module.buffers(recurse=False)) for module in self.frozen]
            kept = [tensor for tensors in own for tensor in itertools.chain(*tensors) if tensor.is_floating_point()]
            kept = [tensor for tensor in kept if id(tensor) not in changing]
            return {"layers": fingerprint(_joined(kept))} if kept and not (whole and changing) else {}
        parts = {"embedding": self.core.get_input_embeddings(), "first layer": self.layers[0]}
        parts["last layer"] = self.layers[-1]
        weights = {
            name: [p for p in module.parameters() if id(p) not in changing]
            for name, module in parts.items()
            if not (whole and any(id(p) in changing for p in module.parameters()))
        }
        return {
            name: fingerprint(_joined(tensors))
            for name, tensors in weights.items()
            if not any(is_quantised(tensor) for tensor in tensors)
        }

    def check(self, expected: Mapping[str, str], source: str | None, trained: Iterable[nn.Parameter] = ()) -> None:
        """Raise `FastpeftError` where a fingerprint that was kept is not of this model's weights without `trained`."""
        found = self.fingerprints(trained)
        different = [name for name, text in expected.items() if not fingerprints_agree(text, found.get(name, text))]
        if different:
            raise FastpeftError(
                f"the side network was trained on another backbone: weights of the {' and the '.join(different)} "
                f"differ. Load it on {source or 'the model it was trained on'}, unchanged and wrapped as it was there."
            )
        if expected.keys() - found.keys():
            logger.warning("weights of a quantised backbone cannot be compared; check that it is %s", source)

    # -- passes --------------------------------------------------------------------------------------------------

    def compile(self, **options: Any) -> None:
        """Compile each layer; hooks on it, which read and replace features, stay outside of what is compiled.

        Args:
            options: as `torch.compile` takes them.
        """
        for layer in self.layers:
            layer.forward = CompiledForward(layer, options)

    def arguments(self, given: Mapping[str, Any], part: nn.Module | None = None) -> dict[str, Any]:
        """What a transformers model is called with, or a part of it such as its body.

        That is what of `given` is not None, without token types where the part knows none; no keys and values are kept.
        """
        accepted = inspect.signature((self.core if part is None else part).forward).parameters
        chosen = {
            name: value
            for name, value in given.items()
            if value is not None and (name != "token_type_ids" or name in accepted)
        }
        return {**chosen, "use_cache": False} if "use_cache" in accepted else chosen

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the body of a model of text is called with: of `given` that which decides the features."""
        return self.arguments({name: given[name] for name in INPUTS if name in given}, self.body)

    def run_body(
        self, given: Mapping[str, Any], feed: Callable[[int, Tensor], None], replace: Callable[[Tensor], Tensor]
    ) -> None:
        """A pass over text without the head; `feed` and `replace` as of `listen`."""
        with self.listen(feed, replace, tokens_of(given)):
            self.body(**self.inputs(given))

    def features(self, given: Mapping[str, Any]) -> list[Tensor]:
        """`B_0 .. B_L` of text, each `(B, T, d)`."""
        kept: list[Tensor] = []
        self.run_body(given, lambda _, feature: kept.append(feature), lambda feature: feature)
        if len(kept) != len(self.layers) + 1:
            raise FastpeftError(
                f"a pass made {len(kept)} features of {len(self.layers) + 1}. Name in feature_modules layers that run "
                "once each."
            )
        return kept

    @contextlib.contextmanager
    def listen(
        self,
        feed: Callable[[int, Tensor], None],
        replace: Callable[[Tensor], Tensor],
        tokens: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """While the block runs, hand each feature to `feed` and let `replace` change the last layer's output.

        What of the body comes after the layers, a pooler, trains in float32: after layers in half precision it runs
        under autocast. Both see features as `(B, T, d)`: one token of a `(B, d)`, and H W of a `(B, d, H, W)`, as
        convolutions make it.

        Args:
            feed, replace: see above.
            tokens: B and T, which all features must have; None takes those of the first.

        Raises:
            FastpeftError: while it runs, where a feature has another shape.
        """

        def take(layer: int, feature: Any) -> Tensor:
            nonlocal tokens
            found = _as_tokens(feature, layer)
            tokens = found.shape[:2] if tokens is None else tokens
            expected = (*tokens, self.feature_sizes[layer])
            if found.shape != expected:
                raise FastpeftError(
                    f"the feature of layer {layer} has the shape {tuple(found.shape)}; it must be (B, T, d), here "
                    f"{expected}. {_CURE_OF_TEXT if self.input_name == 'input_ids' else _CURE}"
                )
            feed(layer, found)
            return found

        def before_first(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            take(0, args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))

        def after(index: int) -> Callable[..., Any]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                feature = output[0] if isinstance(output, tuple) else output
                found = take(index, feature)
                if index < len(self.layers):
                    return None
                replaced = _from_tokens(replace(found), feature.shape)
                after_layers.enter_context(autocast_of(replaced))
                return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

            return hook

        handles = [self.layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        handles += [layer.register_forward_hook(after(index)) for index, layer in enumerate(self.layers, 1)]
        try:
            with contextlib.ExitStack() as after_layers:
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def skip_layers(self, output: Tensor) -> Iterator[None]:
        """While the block runs, the layers compute nothing and the last one's output is `output`, `(B, T, d)`.

        What remains of the model's pass is its embeddings and its head. The first time, the first layer runs
        too, to learn whether layers return a tensor or a tuple.

        Raises:
            FastpeftError: the model is no transformers model, so what is between its layers is not known.
        """
        if self.plain:
            raise FastpeftError(
                f"a pass without its layers is for transformers models; the base is a {type(self.core).__name__}. Run "
                "it whole: give it a LadderModel of its own, without a cache."
            )
        last = self.layers[-1]

        def forward_of(layer: nn.Module) -> Callable[..., Any]:
            computed = layer.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                if self._tuple_size is None:
                    with torch.no_grad():
                        returned = computed(*args, **kwargs)
                    self._tuple_size = len(returned) if isinstance(returned, tuple) else 0
                hidden = output if layer is last else args[0] if args else kwargs["hidden_states"]
                return (hidden, *[None] * (self._tuple_size - 1)) if self._tuple_size else hidden

            return forward

        before = [vars(layer).get("forward") for layer in self.layers]
        try:
            for layer in self.layers:
                layer.forward = forward_of(layer)
            yield
        finally:
            for layer, own in zip(self.layers, before):
                del layer.forward
                if own is not None:
                    layer.forward = own


def tokens_of(given: Mapping[str, Any]) -> torch.Size | None:
    """B and T of text; None for other inputs."""
    source: Tensor | None = given.get("input_ids", given.get("inputs_embeds"))
    return None if source is None else source.shape[:2]


def autocast_of(feature: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What float32 modules that read `feature` run under: autocast in its dtype if that has 16 bits and none is on."""
    kind, dtype = feature.device.type, feature.dtype
    if dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(kind):
        return torch.autocast(kind, dtype)
    return contextlib.nullcontext()


def _as_tokens(feature: Any, layer: int) -> Tensor:
    """A feature as `(B, T, d)`; see `Backbone.listen`."""
    if isinstance(feature, Tensor) and feature.is_floating_point():
        if feature.ndim == 2:
            return feature[:, None]
        if feature.ndim == 3:
            return feature
        if feature.ndim == 4:
            return feature.flatten(2).mT
    found = f"{feature.dtype} {tuple(feature.shape)}" if isinstance(feature, Tensor) else type(feature).__name__
    raise FastpeftError(
        f"the feature of layer {layer} is {found.removeprefix('torch.')}; allowed are floating-point (B, T, d), (B, d) "
        "and (B, C, H, W). Name in feature_modules layers that read and make such."
    )


def _from_tokens(tokens: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_as_tokens`, for a feature that had `shape`."""
    if len(shape) == 2:
        return tokens[:, 0]
    return tokens if len(shape) == 3 else tokens.mT.reshape(shape)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """All values in one vector, in the least precise of their dtypes, so that a cast of some stays comparable."""
    dtype = max((tensor.dtype for tensor in tensors), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.cat([tensor.detach().flatten().to(dtype) for tensor in tensors])


def _cure_of_headless(config: Any) -> str:
    """What to load in place of a model without a head of its own."""
    heads = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING)
    if named := [classes[type(config)].__name__ for classes in heads if type(config) in classes]:
        return f"Load the model with {' or '.join(named)}."
    if getattr(config, "is_encoder_decoder", False):  # as LongT5, whose models for text keep all in one
        return (
            f"Transformers has no classifier of the kind {config.model_type}: put its encoder and a head into an "
            "nn.Module of your own, and name the encoder's layers in feature_modules."
        )
    return "Load the model with another class, which has one."


def _lengths(lists: Mapping[str, Sequence[nn.Module]]) -> str:
    return ", ".join(f"{name} ({len(blocks)})" for name, blocks in lists.items())
