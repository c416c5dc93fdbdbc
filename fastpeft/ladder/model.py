"""A frozen backbone with a side network beside it, as a transformers model."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone, autocast_of, tokens_of
from fastpeft.ladder.cache import DTYPES, FeatureCache, can_cache
from fastpeft.ladder.causality import check_told, decide_causal
from fastpeft.ladder.config import LadderConfig
from fastpeft.ladder.convert import convert
from fastpeft.ladder.frozen import is_quantised
from fastpeft.ladder.pruning import prune
from fastpeft.ladder.saved import (
    ADAPTER_FOLDER,
    check_shape,
    check_weights,
    describe_base,
    load_base,
    read_config,
    read_weights,
    some,
    with_adapter,
    write_card,
)
from fastpeft.ladder.side import SideNetwork, SideRun
from fastpeft.support.processes import agreed

# arguments of `from_pretrained` that say where files are
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


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
            `backbone_dtype`, widths do not divide, or the configuration is that of a side network on another backbone;
            or the base predicts next tokens, and later ones would be seen: see `LadderConfig.causal`.

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
        backbone = Backbone(base, config.feature_modules, config.feature_sizes)
        adapters = backbone.adapter_parameters() if config.train_adapters else {}
        config.causal = decide_causal(backbone, config.causal)
        if config.base_fingerprints:
            backbone.check(config.base_fingerprints, config.base_model_name_or_path, adapters.values())
        causal = bool(config.causal)
        side = SideNetwork(config, backbone.feature_sizes, len(backbone.layers), backbone.activation, causal)
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
        self.side_run: type[SideRun] = SideRun  # what makes a pass of the side network
        # what takes the place of a pass through the backbone, and of one through the side network
        self._given_features: Sequence[Tensor] | None = None
        self._given_output: Tensor | None = None
        base.requires_grad_(False)
        self.adapters = {f"base.{name}": parameter for name, parameter in adapters.items()}
        # the layer from which on gradients flow through the backbone; L + 1 where through none
        self._gradients_from = backbone.layer_of(adapters.values())
        for parameter in (*head.values(), *adapters.values()):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self._trained = {f"base.{name}" for name in (*head, *adapters, *backbone.head_buffers())}
        self._trained |= {f"side.{name}" for name in side.state_dict()}
        describe_base(self.config, backbone.core)
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
            FastpeftError: the features do not have the shape of the input, the base was copied or replaced, or it is
                no transformers model and answers for each token, and the configuration's `causal` is None.
        """
        if self.backbone.model is not self.base:
            raise FastpeftError(
                "the base is not the module that this LadderModel was made with. nn.DataParallel copies it: use one "
                "GPU, or a process per GPU by torchrun. Where it was replaced, make a new LadderModel."
            )
        text = input_ids if input_ids is not None else inputs_embeds
        if (inputs if self.backbone.plain else text if text is not None else pixel_values) is None:
            names = "inputs" if self.backbone.plain else "input_ids, inputs_embeds or pixel_values"
            raise FastpeftError(f"LadderModel beside a {type(self.backbone.core).__name__} got no {names}. Give it.")
        if text is not None:
            _check_mask(attention_mask, text.shape[:2])
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "labels": labels,
            "start_positions": start_positions,
            "end_positions": end_positions,
            "output_hidden_states": False,
        }
        device = self.side.up.weight.device
        mask = None if attention_mask is None else attention_mask.to(device).bool()
        seed = blocks_seed = self.draw_seed()
        if seed and self.config.layer_drop and torch.is_grad_enabled():
            blocks_seed = agreed(seed, device)  # or each process would wait for gradients that others do not have
        run = self.side_run(self.side, mask, seed, bool(output_hidden_states), blocks_seed)
        if self.backbone.plain:
            with self._around_base(run, {}):
                logits = self.base(inputs)
            check_told(self.config.causal, self.base, logits)
            outputs = _with_loss(logits, labels)
        else:
            arguments = self.backbone.arguments(given)
            with self._around_base(run, arguments):
                outputs = self.base(**arguments, return_dict=True)
        if run.states:
            outputs["hidden_states"] = tuple(run.states)
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing: a side network keeps no keys and values, and the base's own `generate` would leave it out.

        Raises:
            FastpeftError: always.
        """
        raise FastpeftError(
            "a LadderModel does not generate: its side network keeps no keys and values of earlier tokens. Append the "
            "token that you choose of logits[:, -1] and call the model again. model.base.generate() is the base alone."
        )

    @contextlib.contextmanager
    def _around_base(self, run: SideRun, arguments: Mapping[str, Any]) -> Iterator[None]:
        """While the block runs, a pass of the base has the output of `run` for that of its encoder.

        Where features are given or cached, or the output is given, the base's layers do not run.
        """
        features, output, cache = self._given_features, self._given_output, self.feature_cache
        gradients, device = torch.is_grad_enabled(), self.side.up.weight.device
        with contextlib.ExitStack() as around, contextlib.ExitStack() as frozen:
            if self._gradients_from > 0:
                frozen.enter_context(torch.no_grad())

            def feed(layer: int, feature: Tensor) -> None:
                if layer == 0:
                    _check_mask(run.mask, feature.shape[:2])
                if layer < self._gradients_from:
                    feature = feature.detach()
                with torch.set_grad_enabled(gradients):
                    if self.backbone.plain:
                        feature = feature.clone()  # an activation in place may follow
                    run.feed(layer, feature.to(device))
                if layer == self._gradients_from - 1:
                    frozen.close()

            def replace(feature: Tensor) -> Tensor:
                """From here on the base computes its head."""
                around.enter_context(autocast_of(feature))  # the head is float32
                return run.output().to(feature)

            if output is not None:
                frozen.close()
                around.enter_context(autocast_of(output))
            elif features is None and cache is not None and can_cache(arguments):
                features = cache.features(arguments)
            if output is None and features is not None:
                for layer, feature in enumerate(features):
                    feed(layer, feature)
                output = replace(features[-1])
            if output is not None:
                around.enter_context(self.backbone.skip_layers(output))
            else:
                around.enter_context(self.backbone.listen(feed, replace, tokens_of(arguments)))
            yield

    @contextlib.contextmanager
    def reading(self, features: Sequence[Tensor]) -> Iterator[None]:
        """While the block runs, passes read `features`, `B_0 .. B_L`, and the backbone's layers do not run."""
        self._given_features = features
        try:
            yield
        finally:
            self._given_features = None

    @contextlib.contextmanager
    def answering(self, output: Tensor) -> Iterator[None]:
        """While the block runs, passes take `output`, `(B, T, d)`, for the side network's: they compute the head."""
        self._given_output = output
        try:
            yield
        finally:
            self._given_output = None

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
            self.feature_cache = FeatureCache(self.backbone, folder, dtype, max_bytes)
        return self.feature_cache

    # -- files ---------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the side network and what trains of the head, their configuration and a model card.

        Args:
            save_directory: a folder, made if need be.
            args, kwargs: as for `PreTrainedModel.save_pretrained`.
        """
        describe_base(self.config, self.backbone.core)
        if not self.config.base_fingerprints:
            self.config.base_fingerprints = self.backbone.fingerprints(self.adapters.values(), whole=True)
        if kwargs.get("is_main_process", True):
            write_card(self.config, Path(save_directory))
            if self.adapters:
                self.base.save_pretrained(Path(save_directory) / ADAPTER_FOLDER)  # type: ignore[operator]
        super().save_pretrained(save_directory, *args, **kwargs)

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
            base = with_adapter(base, source, hub)
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
        check_shape(saved, self.config, name)
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
        check_weights(weights, self.state_dict(), self._trained, source)
        self.load_state_dict(weights, strict=False)


def _check_floating(head: Mapping[str, nn.Parameter], kind: str) -> None:
    """Raise `FastpeftError` where what shall train is stored in few bits."""
    quantised = [name for name, parameter in head.items() if is_quantised(parameter)]
    if quantised:
        modules = list(dict.fromkeys(name.rpartition(".")[0] for name in quantised))
        raise FastpeftError(
            f"the head of the {kind} is quantised ({some(quantised)}), and it trains. Load the base with "
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
