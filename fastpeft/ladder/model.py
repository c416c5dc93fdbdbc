"""A frozen backbone with a side network beside it, as a transformers model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastpeft.cards import model_card
from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone, autocast_of
from fastpeft.ladder.cache import DTYPES, FeatureCache, can_cache
from fastpeft.ladder.config import LadderConfig
from fastpeft.ladder.frozen import convert, is_quantised
from fastpeft.ladder.pruning import prune
from fastpeft.ladder.saved import ADAPTER_FOLDER, load_adapter, load_base, read_config, read_weights, task_fields
from fastpeft.ladder.side import SideNetwork, SideRun
from fastpeft.processes import agreed

# arguments of `from_pretrained` that say where files are
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")

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


class LadderModel(PreTrainedModel):
    r"""A pretrained model whose encoder's output is replaced by that of a side network, which reads its features.

    The backbone runs in evaluation mode and without gradients; it is never changed, saved or given to an optimizer.
    The side network trains, and of the model's own head all but a decoder to the vocabulary, in float32 whatever the
    backbone's dtype. All of it is what `save_pretrained` writes; the backbone is named, and recognised when loading.

    The backbone may take fewer bits: in the dtype that the base was loaded in, by `config.backbone_dtype`, which is
    repeated when loading, or quantised by bitsandbytes or torchao, but for the head.

    The base may be any module whose layers `feature_modules` names, in the order in which they run. Its head is then
    what comes after the last of them in the order of `base.modules()`, and trains. `forward` gives it `inputs`, its one
    argument, and takes the tensor that it returns for logits. It has no name to be loaded by: pass it as
    `from_pretrained(..., base=module)`.

    With `train_adapters` an adapter that PEFT put into the base trains too: the features of its layers reach the side
    network with their gradients, and back-propagation ends at the first of them. It is saved with the side network,
    and in the folder `adapter` as PEFT saves and reads it.

    Args:
        base: a transformers model with a head, another module, or PEFT's wrapper of one. It is taken over: its backbone
            is frozen.
        config: what the side network is made of; it is copied.

    Raises:
        FastpeftError: the base has no head, its head is quantised, its layers are not found or cannot be brought to
            `backbone_dtype`, widths do not divide, or the configuration is that of a side network on another backbone.

    Notes:
        A model that answers questions has `start_positions` and `end_positions` for labels, which
        `transformers.Trainer` must be told by `label_names` to evaluate its loss. A model makes one pass at a time: it
        listens to the backbone by hooks that are there while `forward` runs, so threads need a lock around it, and
        `nn.DataParallel` is refused.

    Example:
        >>> base = AutoModelForSequenceClassification.from_pretrained("roberta-large")  # doctest: +SKIP
        >>> model = fastpeft.LadderModel(base, fastpeft.LadderConfig(window_size=9))  # doctest: +SKIP
        >>> layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> config = LadderConfig(window_size=3, reduction_factor=4, feature_modules=["0", "2"])
        >>> LadderModel(layers, config)(inputs=torch.randn(5, 8)).logits.shape
        torch.Size([5, 3])
    """

    config_class = LadderConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"

    def __init__(self, base: nn.Module, config: LadderConfig) -> None:
        if not isinstance(config, LadderConfig):
            raise FastpeftError(
                f"LadderModel takes a model and a LadderConfig; the configuration is a {type(config).__name__}. Write "
                "LadderModel(base, LadderConfig(...))."
            )
        config = copy.deepcopy(config)
        backbone = Backbone(base, config.feature_modules)
        adapters = backbone.adapter_parameters() if config.train_adapters else {}
        if config.base_fingerprints:
            backbone.check(config.base_fingerprints, config.base_model_name_or_path, adapters.values())
        config.causal = backbone.causal if config.causal is None else config.causal
        sizes = backbone.feature_sizes(config.feature_sizes)
        side = SideNetwork(config, sizes, len(backbone.layers), backbone.activation, config.causal)
        head = backbone.head_parameters()
        _check_floating(head, type(backbone.core).__name__)
        if config.init == "pruned":
            prune(side, backbone)
        convert(backbone, config.backbone_dtype)
        super().__init__(config)
        self.backbone = backbone  # the base taken apart
        self.base = base
        self.main_input_name = backbone.input_name
        self.side = side.to(backbone.device)
        self.feature_cache: FeatureCache | None = None
        base.requires_grad_(False)
        self.adapters = {f"base.{name}": parameter for name, parameter in adapters.items()}
        # the layer from which on gradients flow through the backbone; L + 1 where through none
        self._gradients_from = backbone.layer_of(adapters.values())
        for parameter in (*head.values(), *adapters.values()):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._trained = {f"base.{name}" for name in (*head, *adapters, *backbone.head_buffers())}
        self._trained |= {f"side.{name}" for name in side.state_dict()}
        self._describe_base()
        self.post_init()
        # ties are between frozen weights, and the base keeps them; save_pretrained and the Trainer read these names
        self.all_tied_weights_keys: dict[str, str] = {}
        self._keys_to_ignore_on_save = self.state_dict().keys() - self._trained
        self.train(base.training)

    def init_weights(self) -> None:
        """Nothing: the base comes initialised, and the side network's layers do it themselves."""

    def get_input_embeddings(self) -> nn.Module:
        if self.backbone.plain:
            raise NotImplementedError(f"a {type(self.backbone.core).__name__} names no input embeddings")
        embeddings: nn.Module = self.backbone.core.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> LadderModel:
        """Set the side network and the head to training mode; the backbone stays in evaluation mode."""
        super().train(mode)
        for module in self.backbone.frozen:
            module.training = False  # its children may belong to the head
        return self

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs: Tensor | None = None,
        labels: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """What the base model returns: `loss` where labels are given, and `logits`.

        Args:
            input_ids: `(B, T)`, or `inputs_embeds` `(B, T, d)`; of a vision model `pixel_values`, as it takes them; of
                a module that is no transformers model `inputs`, its one argument.
            attention_mask: `(B, T)`, 1 for tokens and 0 for padding; for `inputs` it concerns the side network alone.
            token_type_ids, position_ids: `(B, T)`; the former is dropped where the base knows no token types.
            labels, start_positions, end_positions: as the base takes them. Beside a module that is no transformers
                model, integer labels are classes, for the cross-entropy, and others are numbers in the shape of the
                logits, for the mean squared error.
            output_hidden_states: whether to return the side network's states `theta_0 .. theta_L`, each `(B, T, D)`,
                as `hidden_states`.
            return_dict: False for a tuple.

        Raises:
            FastpeftError: the features do not have the shape of the input, or the base was copied or replaced.
        """
        text = input_ids if input_ids is not None else inputs_embeds
        if (inputs if self.backbone.plain else text if text is not None else pixel_values) is None:
            names = "inputs" if self.backbone.plain else "input_ids, inputs_embeds or pixel_values"
            raise FastpeftError(f"LadderModel beside a {type(self.backbone.core).__name__} got no {names}. Give it.")
        tokens = None if text is None else text.shape[:2]  # (B, T); of other inputs, those of the first feature
        if tokens is not None:
            _check_mask(attention_mask, tokens)
        if self.backbone.model is not self.base:
            raise FastpeftError(
                "the base is not the module that this LadderModel was made with. nn.DataParallel copies it: use one "
                "GPU, or a process per GPU by torchrun. Where it was replaced, make a new LadderModel."
            )
        accepted = inspect.signature(self.backbone.core.forward).parameters
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids if "token_type_ids" in accepted else None,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "use_cache": False if "use_cache" in accepted else None,
            "output_hidden_states": False,
        }
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        device = self.side.up.weight.device
        mask = None if attention_mask is None else attention_mask.to(device).bool()
        gradients = torch.is_grad_enabled()
        seed = blocks_seed = self.draw_seed()
        if seed and self.config.layer_drop and gradients:
            blocks_seed = agreed(seed, device)  # or each process would wait for gradients that others do not have
        run = SideRun(self.side, mask, seed, bool(output_hidden_states), blocks_seed)

        def feed(layer: int, feature: Tensor) -> None:
            nonlocal tokens
            if tokens is None:
                tokens = feature.shape[:2]
                _check_mask(attention_mask, tokens)
            expected = (*tokens, self.side.feature_sizes[layer])
            if feature.shape != expected:
                raise FastpeftError(
                    f"the feature of layer {layer} has the shape {tuple(feature.shape)}; it must be (B, T, d), here "
                    f"{expected}. {_CURE_OF_TEXT if text is not None else _CURE}"
                )
            if layer < self._gradients_from:
                feature = feature.detach()
            with torch.set_grad_enabled(gradients):
                if self.backbone.plain:
                    feature = feature.clone()  # an activation in place may follow
                run.feed(layer, feature.to(device))
            if layer == self._gradients_from - 1:
                frozen.close()

        with contextlib.ExitStack() as after_layers, contextlib.ExitStack() as frozen:
            if self._gradients_from > 0:
                frozen.enter_context(torch.no_grad())

            def replace(feature: Tensor) -> Tensor:
                """From here on the base computes its head."""
                after_layers.enter_context(autocast_of(feature))  # the head is float32
                return run.output().to(feature)

            if self.feature_cache is not None and can_cache(input_ids):
                read = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "use_cache")
                features = self.feature_cache.features({k: given[k] for k in read if given[k] is not None})
                for layer, feature in enumerate(features):
                    feed(layer, feature)
                around_base = self.backbone.skip_layers(replace(features[-1]))
            else:
                around_base = self.backbone.listen(feed, replace)
            with around_base:
                if self.backbone.plain:
                    outputs = _with_loss(self.base(inputs), labels)
                else:
                    outputs = self.base(**{k: v for k, v in given.items() if v is not None}, return_dict=True)
        if output_hidden_states:
            outputs["hidden_states"] = tuple(run.states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    def draw_seed(self) -> int:
        """A seed for what one pass drops, from torch's random state; 0 where nothing is dropped."""
        if not self.training or self.config.dropout == self.config.layer_drop == 0:
            return 0
        return int(torch.randint(2**63 - 1, (), device="cpu").item())

    def compile_backbone(self, **options: Any) -> None:
        """Compile the backbone's layers, each by itself, when they first run; the result is the same to rounding.

        It is not saved with the side network, and a copy of the model compiles anew.

        Args:
            options: as `torch.compile` takes them.

        Example:
            >>> model.compile_backbone(mode="max-autotune-no-cudagraphs")  # doctest: +SKIP
        """
        self.backbone.compile(**options)

    def cache_features(
        self,
        folder: str | os.PathLike[str] | None,
        dtype: str = DTYPES[0],
        max_bytes: int | None = None,
    ) -> FeatureCache | None:
        """From now on read the backbone's features from a folder, and run it on rows that are not there yet.

        Training and evaluation are as before but for the rounding of features to `dtype`, which all rows get, those
        that were computed too. What a row's features are depends in their last bits on the batch that they were made
        in, so a run repeats to the bit on the same folder or a new one, and else to rounding. A pass on `inputs_embeds`
        does without the cache.

        Args:
            folder: made if need be, and shared: by side networks, backbones, runs and processes; None ends caching.
            dtype: `"bfloat16"`, `"float32"` or `"int8"`, in which each token of a layer has a scale.
            max_bytes: what the folder may take; what does not fit is computed anew each time. None is half of what it
                takes and its disk has free.

        Returns:
            The cache, whose `hits` and `misses` count rows; None where caching ended. A `PromptModel`'s is that of its
            `masked_lm`.

        Raises:
            FastpeftError: an argument cannot be used, or the folder cannot be written, or the base has other input.

        Notes:
            A token takes as many values as all features are wide, `(L + 1) d`. Changed weights of the backbone have
            features of their own; a change by `.data` alone goes unseen. A record that is damaged is computed anew.

        Example:
            >>> model.cache_features("features")  # doctest: +SKIP
        """
        self.feature_cache = None
        if folder is not None:
            if self.adapters:
                raise FastpeftError(
                    "an adapter in the backbone trains with the side network (train_adapters), so its features change "
                    "at every step and cannot be cached. Leave out either."
                )
            self.feature_cache = FeatureCache(self.backbone, self.side.feature_sizes, folder, dtype, max_bytes)
        return self.feature_cache

    # -- files ---------------------------------------------------------------------------------------------------

    def _describe_base(self) -> None:
        """Copy into the configuration what names the base and its task."""
        core, config = self.backbone.core, self.config
        config.base_class = type(core).__name__
        if self.backbone.plain:
            return
        for name, value in task_fields(core.config).items():
            setattr(config, name, value)
        config.base_model_name_or_path = core.config.name_or_path or config.base_model_name_or_path
        config.base_revision = getattr(core.config, "_commit_hash", None) or config.base_revision

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the side network and what trains of the head, their configuration and a model card.

        Args:
            save_directory: a folder, made if need be.
            args, kwargs: as for `PreTrainedModel.save_pretrained`.
        """
        self._describe_base()
        if not self.config.base_fingerprints:
            self.config.base_fingerprints = self.backbone.fingerprints(self.adapters.values(), whole=True)
        if kwargs.get("is_main_process", True):
            self._write_card(Path(save_directory))
            if self.adapters:
                self.base.save_pretrained(Path(save_directory) / ADAPTER_FOLDER)  # type: ignore[operator]
        super().save_pretrained(save_directory, *args, **kwargs)

    def _write_card(self, folder: Path) -> None:
        """Write a model card; one that is there is kept."""
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / "README.md"
        if card.exists():
            return
        config = self.config
        shown = (
            "window_size",
            "reduction_factor",
            "fusion",
            "num_heads",
            "residual",
            "init",
            "layer_drop",
            "share_projections",
            "output_mix",
            "backbone_dtype",
        )
        text = model_card(
            base_model=config.base_model_name_or_path or "the base model",
            method="LST" if config.fusion == "gated" else f"{config.window_size}-LST",
            snippet=f"import fastpeft\n\nmodel = fastpeft.LadderModel.from_pretrained({folder.name!r})",
            adapter=False,
            settings={name: getattr(config, name) for name in shown} | {"feature_dropout": config.dropout},
        )
        card.write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base: nn.Module | None = None,
        config: LadderConfig | None = None,
        **kwargs: Any,
    ) -> LadderModel:
        """Load what `save_pretrained` wrote, beside its backbone.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            base: the base model, as it was before the side network was put beside it, with or without the adapter that
                trained too; None loads it by its id, with the revision, dtype and labels it had.
            config: in place of the saved configuration.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `subfolder` of what was
                saved; all others, as `dtype` or `device_map`, go to the base's `from_pretrained`.

        Returns:
            The model, in evaluation mode.

        Raises:
            FastpeftError: nothing of this kind is there, or the base is another than the side network was trained on.
        """
        source = str(pretrained_model_name_or_path)
        hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        if config is None:
            config = read_config(source, hub)
        weights = read_weights(source, hub)
        if base is None:
            base = load_base(config, kwargs)
        elif kwargs:
            raise FastpeftError(
                f"from_pretrained got a base and {', '.join(kwargs)}, which are for loading one. Leave out either."
            )
        if config.train_adapters and not isinstance(base, PeftModel):
            base = load_adapter(base, source, hub)
        unpruned = copy.deepcopy(config)
        unpruned.init = "random"  # the weights come from the file, and the base may be quantised now
        model = cls(base, unpruned)
        model.config.init = config.init
        model._take_in(weights, source)
        return model.eval()

    def take_over(self, source: str | os.PathLike[str], *, head: bool) -> None:
        """Go on from a saved side network of the same shape on the same backbone.

        An adapter that trained with it is taken over by one that trains here; else the backbone must have it merged.

        Args:
            source: a folder or a hub id.
            head: whether to take over what was trained of the head too.

        Raises:
            FastpeftError: nothing of this kind is there, or its shape or its backbone is another.
        """
        name = os.fspath(source)
        saved = read_config(name, {})
        different = [item for item in SHAPE if getattr(saved, item) != getattr(self.config, item)]
        if different:
            there = ", ".join(f"{item} is {getattr(saved, item)!r}" for item in different)
            here = ", ".join(repr(getattr(self.config, item)) for item in different)
            raise FastpeftError(
                f"the side network in {name!r} has another shape: its {there}, here {here}. Give the same values."
            )
        self.backbone.check(saved.base_fingerprints, saved.base_model_name_or_path, self.adapters.values())
        own = self.state_dict()
        weights = {_without_wrapper(item): tensor for item, tensor in read_weights(name, {}).items()}
        taken = {}
        for item in self._trained:
            wanted = saved.train_adapters if item in self.adapters else head or item.startswith("side.")
            found = weights.pop(_without_wrapper(item), None)
            if not wanted:
                taken[item] = own[item]
            elif found is not None:
                taken[item] = found
        if head and saved.train_adapters == self.config.train_adapters:
            taken |= weights  # nothing must be left
        self._take_in(taken, name)

    def _take_in(self, weights: dict[str, Tensor], source: str) -> None:
        """Load saved weights, all that train and no others."""
        own = self.state_dict()
        missing, unknown = sorted(self._trained - weights.keys()), sorted(weights.keys() - self._trained)
        if missing or unknown:
            raise FastpeftError(
                f"{source!r} does not hold the weights of this model: missing {_some(missing)}, unknown "
                f"{_some(unknown)}. Load it with the configuration and the kind of base it was saved with."
            )
        for name, tensor in weights.items():
            if tensor.is_floating_point() != own[name].is_floating_point() or not tensor.isfinite().all():
                raise FastpeftError(
                    f"{name} in {source!r} is damaged: it holds {tensor.dtype} numbers, or such as are not finite. "
                    "Restore the file, or train anew."
                )
            if tensor.shape != own[name].shape:
                raise FastpeftError(
                    f"{name} in {source!r} has the shape {tuple(tensor.shape)} and here {tuple(own[name].shape)}. Load "
                    "it on the backbone it was trained on, with as many classes."
                )
        self.load_state_dict(weights, strict=False)


_CURE_OF_TEXT = (
    "Load the base with attn_implementation='sdpa', which keeps padding, without virtual tokens, and name in "
    "feature_modules only layers of the backbone's width."
)
_CURE = (
    "Name in feature_modules layers between which the number of tokens stays, H W for (B, C, H, W), and give in "
    "feature_sizes their widths where they were not found."
)


def _check_floating(head: Mapping[str, nn.Parameter], kind: str) -> None:
    """Raise `FastpeftError` where what shall train is stored in few bits."""
    quantised = [name for name, parameter in head.items() if is_quantised(parameter)]
    if quantised:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in quantised))
        raise FastpeftError(
            f"the head of the {kind} is quantised ({_some(quantised)}), and it trains. Load the base with "
            f"BitsAndBytesConfig(..., llm_int8_skip_modules={modules}), or the like of another quantization_config."
        )


def _check_mask(attention_mask: Tensor | None, tokens: torch.Size) -> None:
    if attention_mask is not None and attention_mask.shape != tokens:
        raise FastpeftError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; the side network takes (B, T), here "
            f"{tuple(tokens)}, with 1 for tokens and 0 for padding."
        )


def _with_loss(logits: Any, labels: Tensor | None) -> SequenceClassifierOutput:
    """What a module that is no transformers model returned, as transformers' models do."""
    if not isinstance(logits, Tensor):
        raise FastpeftError(
            f"the base returned a {type(logits).__name__}; beside a side network a module returns its logits, a "
            "tensor. Wrap it in one that does."
        )
    if labels is None:
        return SequenceClassifierOutput(logits=logits)
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise FastpeftError(
                f"labels have the shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}. Give numbers in "
                "the shape of the logits, or classes as integers."
            )
        return SequenceClassifierOutput(loss=F.mse_loss(logits, labels), logits=logits)
    if labels.shape != logits.shape[:-1]:
        raise FastpeftError(
            f"labels have the shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}, whose last dimension "
            "is the classes. Give a class for each of the others."
        )
    return SequenceClassifierOutput(loss=F.cross_entropy(logits.flatten(0, -2), labels.flatten()), logits=logits)


def _without_wrapper(name: str) -> str:
    """The name of a weight, the same whether PEFT wraps the base or not."""
    return name.replace("base.base_model.model.", "base.", 1)


def _some(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"
