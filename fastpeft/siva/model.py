"""SiVA as a PEFT method: which layers of a model it adapts."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, cast_adapter_dtype
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import TrainableTokensWrapper, _get_input_embeddings_name
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastpeft.errors import FastpeftError
from fastpeft.models import TOKENS_FIRST
from fastpeft.ops.backends import warn_if_not_compiled
from fastpeft.siva import grouping
from fastpeft.siva.base import is_in_4_bits
from fastpeft.siva.config import SivaConfig, check_name, is_all_linear
from fastpeft.siva.heads import head_names, let_heads_train, warn_of_statistics
from fastpeft.siva.layer import SivaLinear
from fastpeft.siva.pissa import PissaAdapter
from fastpeft.siva.rows import BASE, AdapterRows, acting, outside_adapters
from fastpeft.siva.state import State
from fastpeft.siva.targets import (
    check_not_held_aside,
    check_saved_layers,
    check_target,
    endings,
    in_chosen_blocks,
    leave_heads_out,
    limit_ranks,
    no_target,
    rank_of,
    reading_hidden_states,
    tied_parameters,
    warn_of_a_long_start,
    warn_of_stacks,
    warn_of_unmatched,
)
from fastpeft.support.fingerprints import fingerprints_agree
from fastpeft.support.four_bits import keep_form
from fastpeft.support.generation import option
from fastpeft.support.stages import report

logger = logging.getLogger(__name__)

# `scaling="spectral"`: how far each triplet's part of the weight moves, in the spectral norm and as a share of the
# weight's, when an optimizer moves every trained entry by 1. It is divided by the number of layers, since their effects
# add up. A learning rate of 1e-3 then suits all models in `bench/data/siva_rates.csv`.
SPECTRAL_STEP = 1500.0


class SivaModel(BaseTuner):
    """A model whose chosen linear layers are `SivaLinear`; made by `peft.get_peft_model` from a `SivaConfig`.

    PEFT's `adapter_names=[...]`, an argument of the model's forward and of `generate`, gives each row of a batch an
    adapter of its own, in training too. `model.set_requires_grad([...])` makes adapters beside the active one train.
    Checkpoint blocks by transformers' own switch only: other checkpoints run again in backward without knowing the
    rows.
    """

    prefix: str = "siva_"
    tuner_layer_cls = SivaLinear

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        self._of_peft_model = isinstance(peft_config, dict)  # else adapters are injected
        super().__init__(model, peft_config, *args, **kwargs)
        if self._of_peft_model:  # a model with injected adapters is saved as it is stored
            model.register_state_dict_post_hook(_give_pretrained)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        warn_if_not_compiled()
        config = self.peft_config[adapter_name]
        check_name(adapter_name)
        if config.init_weights != "saved" and (kwargs.get("low_cpu_mem_usage") or _makes_empty_factors(model)):
            raise FastpeftError(
                f"low_cpu_mem_usage=True for the new adapter {adapter_name!r}: it makes empty factors for a saved "
                "adapter to fill. Those of a new one are computed from the weights: leave it out."
            )
        keep_form(model, passes_gradients=True)  # through layers that are not adapted too
        self._heads, self._adding = head_names(model), adapter_name
        self._pissa = None if config.pissa is None else PissaAdapter.read(config.pissa)
        if config.init_weights != "saved" and self._pissa is None:  # a file has the modules that it has
            let_heads_train(config, self._heads, model, self._of_peft_model)
            warn_of_statistics(config, model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if self._pissa is not None:
                self._pissa.fill_saved_modules(model, adapter_name)
        finally:
            del self._pissa  # a model is copied and pickled without it
        grouping.arrange(model)

    def _prepare_adapter_config(self, peft_config: SivaConfig, model_config: dict[str, Any]) -> SivaConfig:
        return peft_config  # target_modules=None is resolved by looking at the model, in _prepare_model

    def _prepare_model(self, peft_config: SivaConfig, model: nn.Module) -> None:
        """Resolve the targets, and refuse those that cannot be adapted before the first layer is changed."""
        if isinstance(model, (nn.Linear, Conv1D)):
            raise FastpeftError(
                f"the model is itself a {type(model).__name__}, so there is no module in which to put another in its "
                "place. Give nn.Sequential(layer), or use fastpeft.SivaLinear.from_linear(layer)."
            )
        wanted = peft_config.target_modules
        by_kind = wanted is None or is_all_linear(wanted)  # of layers, not by their names
        if by_kind:
            peft_config.target_modules = INCLUDE_LINEAR_LAYERS_SHORTHAND
            _maybe_include_all_linear_layers(peft_config, model)
            found: Collection[str] = peft_config.target_modules
            if wanted is None:
                found = reading_hidden_states(model, found)
            if peft_config.layers_to_transform is not None:
                found = in_chosen_blocks(peft_config, found)
            peft_config.target_modules = found
        targets, linear = self._find_targets(peft_config, model)
        if not targets:
            raise no_target(peft_config, linear, model)
        if peft_config.init_weights != "saved" and self._pissa is None:  # what a file says was given to another model
            names = () if wanted is None or isinstance(wanted, str) else wanted
            warn_of_unmatched(peft_config, names, linear, targets, model, self._is_head)
            warn_of_stacks(model, self._is_head, None if by_kind else endings(targets))
        if by_kind:
            leave_heads_out(peft_config, targets)
            limit_ranks(peft_config, targets)
        check_tokens(peft_config, model)
        if any(is_in_4_bits(getattr(module, "base_layer", module)) for module in targets.values()):
            _make_implicit(peft_config)
        tied = tied_parameters(model)
        for name, module in targets.items():
            check_target(peft_config, self._adding, name, module, tied)
        check_saved_layers(peft_config, targets)
        check_not_held_aside(model, targets)
        if self._pissa is not None:
            self._pissa.check_targets(targets)
        elif peft_config.init_weights != "saved":
            warn_of_a_long_start(peft_config, targets)
        layers = (layer for layer in targets.values() if isinstance(layer, SivaLinear))
        _warn_of_rounding(layer for layer in layers if layer.is_last(self._adding))  # it is replaced
        self._number_of_targets, self._number_made, self._warned_of_bases = len(targets), 0, False

    def _find_targets(self, peft_config: SivaConfig, model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
        """The modules that are to be adapted, by name, and the names of all linear layers outside heads."""
        adapted = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        modules = {name: module for name, module in model.named_modules() if not name.startswith(adapted)}
        targets = {
            name: module
            for name, module in modules.items()
            if name and self._check_target_module_exists(peft_config, name)
        }
        linear = [
            name
            for name, module in modules.items()
            if isinstance(module, (nn.Linear, Conv1D, SivaLinear)) and not self._is_head(name)
        ]
        return targets, linear

    def _is_head(self, key: str) -> bool:
        return key.partition(".")[0] in self._heads or key in self._heads

    def _check_target_module_exists(self, peft_config: SivaConfig, key: str) -> Any:
        return False if self._is_head(key) else super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: SivaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        r, spectral = rank_of(peft_config, current_key), peft_config.scaling == "spectral"
        step = SPECTRAL_STEP / self._number_of_targets if spectral else None
        if isinstance(target, SivaLinear):
            layer = target
            layer.update_layer(adapter_name, r, peft_config, step)
        else:
            layer = SivaLinear(target, adapter_name, r, peft_config, step=step, name=current_key)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)
        if self._pissa is not None:
            layer.load_factors(adapter_name, *self._pissa.factors(current_key, layer.matrix))
        self._number_made += 1
        report("adapting layers", self._number_made, self._number_of_targets)
        if peft_config.init_weights != "saved" and layer.base_fingerprint is not None:
            before = peft_config.base_fingerprints.get(current_key, layer.base_fingerprint)
            if not self._warned_of_bases and not fingerprints_agree(before, layer.base_fingerprint):
                self._warned_of_bases = True
                logger.warning(
                    "this SivaConfig was given to a model of other weights before; what that model saves from now on "
                    "names these, and is refused beside its own. Give each model a SivaConfig of its own"
                )
            peft_config.base_fingerprints[current_key] = layer.base_fingerprint

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer in its place; it is on the device of the one that it wraps, so nothing is moved or copied.

        PEFT's own method reads `child.weight`, which a separately saved classification head does not have.
        """
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Factors are made in float32; without autocast those that train get the dtype of the base layer."""
        if autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, TrainableTokensWrapper):
                    cast_adapter_dtype(module, adapter_name)
            return
        for layer in self._siva_layers():
            for changes in (layer.siva_du, layer.siva_dv):
                if adapter_name in changes:
                    changes[adapter_name].to(layer.dtype)

    def _siva_layers(self) -> Iterator[SivaLinear]:
        """The adapted layers. The name is private since PEFT looks up any public name in the wrapped model."""
        return (module for _, module in outside_adapters(self.model) if isinstance(module, SivaLinear))

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Keep factors and biases: newer PEFT takes all that a layer has beside its base layer, so a quantised W_r."""
        found: dict[str, Tensor] = super()._get_adapter_state_dict(*args, **kwargs)
        return {key: tensor for key, tensor in found.items() if ".siva_" in key or key.endswith("bias")}

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        if not merge:
            for layer in self._siva_layers():
                layer.check_restorable()  # before the first layer is touched
            _warn_of_rounding(self._siva_layers())
            if any(layer.merged for layer in self._siva_layers()):  # LoRA's unload leaves them in
                logger.warning(
                    "unload() takes the merged adapters out of the weights again. To keep them in, use "
                    "merge_and_unload()"
                )
        grouping.part(self.model)
        model: nn.Module = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        return model

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        tied = tied_parameters(self.model)
        for layer in self._siva_layers():  # before the first of them is touched
            layer.check_mergeable()
            if id(layer.base_layer.weight) in tied:
                raise FastpeftError(
                    f"{layer.name}: its weight is shared with another module, which would take the adapter in too. "
                    "Give it a weight of its own in the base model, or keep the adapter apart."
                )

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Raise `FastpeftError`: a weighted sum of SiVA adapters is not a SiVA adapter. As LoRA they can be summed."""
        raise FastpeftError(
            f"add_weighted_adapter({adapters!r}): a weighted sum of SiVA adapters is no SiVA adapter. Let them act "
            f"together, each with weight 1, by layer.set_adapter({adapters!r}) of each fastpeft.SivaLinear among "
            "model.modules(); the head that runs is still that of model.set_adapter(NAME). Or, if they have no heads, "
            "export each as a LoRA (`fastpeft export --to lora`) and combine those with "
            'combination_type="cat".'
        )

    def delete_adapter(self, adapter_name: str) -> None:
        if any(adapter_name in layer.merged_adapters for layer in self._siva_layers()):
            raise FastpeftError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first. Call "
                "unmerge_adapter(), or merge_and_unload() to keep the adapter in the weights."
            )
        left = [layer for layer in self._siva_layers() if layer.is_last(adapter_name)]
        for layer in left:
            layer.check_restorable()
        _warn_of_rounding(left)
        super().delete_adapter(adapter_name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """If PEFT's `adapter_names` gives a name for each row of the batch, let each row use that adapter."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        device = next(self._siva_layers()).base_layer.weight.device
        with acting(self.model, AdapterRows(names, device, _copies(kwargs, self.model))):
            yield

    def _check_adapter_names(self, names: Any) -> None:
        """Raise `FastpeftError` unless each names an adapter, or `BASE`, and rows can have adapters of their own."""
        known = [*self.peft_config, BASE]
        if not isinstance(names, (list, tuple)) or not names or not all(name in known for name in names):
            raise FastpeftError(
                f"adapter_names={names!r}; give a list with a name for each row of the batch, each one of "
                f"{', '.join(map(repr, known))}, where {BASE!r} is the pretrained model."
            )
        kind = getattr(getattr(self.model, "config", None), "model_type", None)
        if kind in TOKENS_FIRST:  # with as many tokens as rows, no length would show it
            raise FastpeftError(
                f"adapter_names with a model of the type {kind!r}, whose layers read tokens first and rows second, so "
                "that rows would get each other's adapters. Run the model once for each adapter."
            )
        merged = sorted({name for layer in self._siva_layers() for name in layer.merged_adapters})
        if merged:
            raise FastpeftError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. Now "
                f"{', '.join(map(repr, merged))} would act on every row."
            )
        for adapter, config in self.peft_config.items():
            if config.bias != "none" and set(names) != {adapter}:
                raise FastpeftError(
                    f"adapter_names={names!r}: {adapter!r} trains biases (bias={config.bias!r}), which are the model's "
                    f"own and act on every row. Give {adapter!r} to all rows, or train with bias='none'."
                )


def _warn_of_rounding(layers: Iterable[SivaLinear]) -> None:
    """Warn if pretrained weights are about to come back into these layers that are not the base's own."""
    if any(layer.comes_back_rounded for layer in layers):
        logger.warning(
            "the base's weights come back in other bits, rounded, as W_r was stored in their place in half precision. "
            "Load the base again for its own, or use SivaConfig(residual='implicit') from the start"
        )


def _give_pretrained(model: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put the pretrained weights into the wrapped model's own state dict, where W_r is stored.

    PEFT's `get_base_model_state_dict` takes that state dict and removes all names of adapters, so W_r would look like
    the pretrained weight. The state dict of the whole PeftModel, a checkpoint, keeps W_r.
    """
    if prefix:
        return
    for name, layer in model.named_modules():
        weight = layer.pretrained_weight() if isinstance(layer, SivaLinear) else None
        if weight is not None:
            state_dict[f"{name}.base_layer.weight"] = weight
            for adapter, state in layer.states.items():
                state_dict[f"{name}.states.{adapter}"] = torch.full_like(state, int(State.IMPLICIT))


def _copies(arguments: dict[str, Any], model: nn.Module) -> int:
    """How often `generate` of the model, called with these arguments, repeats each row of its input."""
    configs = arguments.get("generation_config"), getattr(model, "generation_config", None)
    return max(option(name, arguments, *configs) or 1 for name in ("num_beams", "num_return_sequences"))


def _make_implicit(peft_config: SivaConfig) -> None:
    """Let the layers of a base in 4 bits keep their weights."""
    given = {"d": peft_config.d, "residual_dtype": peft_config.residual_dtype}
    for name, value in given.items():
        if value is not None:
            raise FastpeftError(
                f"{name}={value!r} on a base in 4 bits, whose weights stay as they are. Leave {name} out, or load the "
                "base model unquantised."
            )
    if peft_config.residual == "frozen":
        logger.info("the base is in 4 bits: its weights stay, and the residual is implicit")
        peft_config.residual = "implicit"


def check_tokens(peft_config: SivaConfig | LoraConfig, model: Any) -> None:
    """Raise `FastpeftError` unless the tokens that train have embeddings, under the names by which PEFT finds them."""
    given = peft_config.trainable_token_indices
    if given is None:
        return
    if not isinstance(given, dict):
        given = {_get_input_embeddings_name(model, "embed_tokens"): given}
    for ending, tokens in given.items():
        found = {name: module for name, module in model.named_modules() if name.endswith(ending)}
        if not found:
            raise FastpeftError(
                f"trainable_token_indices: no module has a name that ends in {ending!r}. Name the embedding by a "
                "dictionary, {name: [token, ...]}."
            )
        if ending in (peft_config.modules_to_save or ()):
            raise FastpeftError(
                f"trainable_token_indices: {ending} is among modules_to_save, which trains all its rows. Leave out "
                "either."
            )
        for name, module in found.items():
            weight = getattr(module, "weight", None)
            if weight is None:
                raise FastpeftError(
                    f"trainable_token_indices: {name} is a {type(module).__name__}, which is no embedding. Give the "
                    "name of an embedding that no other name ends in."
                )
            rows = len(weight)
            if tokens and max(tokens) >= rows:
                raise FastpeftError(
                    f"trainable_token_indices={sorted(tokens)}: {name} has {rows} rows, so tokens are 0 to {rows - 1}. "
                    "Call model.resize_token_embeddings first if the tokenizer has new tokens."
                )
            for other, layer in model.named_modules():
                # PEFT's layer of tokens multiplies by the weight alone
                if isinstance(layer, nn.Linear) and layer.weight is weight and layer.bias is not None:
                    raise FastpeftError(
                        f"trainable_token_indices: {other} has the weight of these tokens and a bias, which PEFT would "
                        "leave out of the outputs. Leave out trainable_token_indices, or load the model with a head "
                        "that has no bias, as most decoders."
                    )


def _makes_empty_factors(model: nn.Module) -> bool:
    """Whether new parameters go to the meta device (PEFT's `low_cpu_mem_usage`), though the model is on another."""
    made = nn.ParameterDict({"probe": torch.empty(0, device="cpu")})["probe"]
    return made.device.type == "meta" and any(each.device.type != "meta" for each in model.parameters())


def register() -> None:
    """Make SIVA known to PEFT: a member of `PeftType`, and its entry in PEFT's tables. Safe to call again."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType, register_peft_method

    if "SIVA" not in PeftType.__members__:
        member = str.__new__(PeftType, "SIVA")
        member._name_, member._value_ = "SIVA", "SIVA"
        PeftType.SIVA = member
        PeftType._member_names_.append("SIVA")
        PeftType._member_map_["SIVA"] = member
        PeftType._value2member_map_["SIVA"] = member
    if PeftType.SIVA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="siva", config_cls=SivaConfig, model_cls=SivaModel, prefix=SivaModel.prefix)
