"""A frozen backbone with a side network beside it, as a transformers model."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from fastpeft.errors import FastpeftError
from fastpeft.ladder.backbone import Backbone, activation_of
from fastpeft.ladder.cache import FeatureCache
from fastpeft.ladder.checks import (
    check_adapters_around,
    check_head,
    check_in_place,
    check_whole,
    warn_of_shared_head,
)
from fastpeft.ladder.config import LadderConfig
from fastpeft.ladder.context import Context
from fastpeft.ladder.conversion import convert, pack
from fastpeft.ladder.fingerprints import check_fingerprints
from fastpeft.ladder.generation import LadderCache, cache_of_pass, prepare_pass, with_cache, with_own_cache
from fastpeft.ladder.inputs import OTHER_CACHES, LadderInputs, WithInputsOfBase
from fastpeft.ladder.passes import Known, LadderPass, hooks_of
from fastpeft.ladder.probe import check_answers, check_generates, decide_defaults, probe
from fastpeft.ladder.saving import SavedModel, agree_on_problem, describe_base
from fastpeft.ladder.side import SideNetwork, SideRun
from fastpeft.ladder.side_step import run_of
from fastpeft.ladder.states import StatesOnly
from fastpeft.ops.backends import warn_if_not_compiled
from fastpeft.ops.fused_head import fuse_any_head
from fastpeft.ops.quantise import count_parameters
from fastpeft.support.eval_mode import in_eval_mode
from fastpeft.support.four_bits import keep_form
from fastpeft.support.processes import agreed

logger = logging.getLogger(__name__)

_DIVISOR = "num_items_in_batch"  # the Trainer's: what a decoder learns in all micro-batches of a step


class LadderModel(SavedModel, PreTrainedModel, GenerationMixin):
    r"""A pretrained model whose encoder's output is replaced by that of a side network, which reads its features.

    The backbone runs in evaluation mode and without gradients; it is never saved or given to an optimizer. The side
    network trains in float32. The model's own head trains too, in float32 or float64, but for the layer of an LM head
    that scores words. `save_pretrained` writes what trains, and names the backbone.

    A base of `AutoModel` has no head: the output is its own, and `last_hidden_state` is what the side network made, in
    the backbone's width and dtype. So it makes embeddings, and the side network alone trains.

    The backbone may take fewer bits: load the base in a smaller dtype, set `config.backbone_dtype` (which loading
    repeats), or quantise all but the head by bitsandbytes or torchao.

    With `train_adapters`, an adapter that PEFT put into the base trains too, through the features of its layers. It is
    saved with the side network, and once more in the folder `adapter`, as PEFT saves and reads it. Its own dropout
    acts in training.

    Beside a decoder it generates text, see `generate`.

    Args:
        base: a transformers model, or PEFT's wrapper of one. It is not copied: its backbone is frozen,
            and all side networks that are made with it have its head in common.
        config: the configuration of the side network; it is copied.

    Raises:
        FastpeftError: the head of the base cannot be told from its body or is quantised, its layers are not found, do
            not run, do not decide its answer alone or cannot be converted to `backbone_dtype`, widths do not divide,
            the configuration is that of a side network on another backbone, or the base predicts next tokens but would
            see them: see `LadderConfig.causal`.

    Notes:
        A model that answers questions has the labels `start_positions` and `end_positions`: name them in the
        `label_names` of `transformers.Trainer` to evaluate its loss. A base that predicts words gets
        `fastpeft.fuse_head`, so that its loss makes no logits. A pass listens to the backbone's layers: threads need a
        lock around it, and `nn.DataParallel` is refused.

    Example:
        >>> base = AutoModelForSequenceClassification.from_pretrained("roberta-large")  # doctest: +SKIP
        >>> model = fastpeft.LadderModel(base, fastpeft.LadderConfig(window_size=9))  # doctest: +SKIP
    """

    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True  # of the side blocks
    _generates = False  # until the base is known
    _warned_of_thawed = False
    _warned_of_inputs = False

    def __init__(self, base: nn.Module, config: LadderConfig) -> None:
        warn_if_not_compiled()
        check_in_place(base)
        config = copy.deepcopy(config)
        backbone = Backbone(base, config.feature_modules)
        adapters = backbone.adapter_parameters() if config.train_adapters else {}
        keep_form(base, passes_gradients=bool(adapters))
        self._decided = decide_defaults(config, backbone)
        if not config.base_fingerprints:  # else its base was looked at when the side network was made
            check_whole(base)
            check_answers(backbone)
        else:
            check_fingerprints(backbone, config.base_fingerprints, config.base_model_name_or_path, adapters.values())
        activation = config.base_activation = config.base_activation or activation_of(backbone.text_config)
        side = SideNetwork(config, backbone.hidden_size, len(backbone.layers), activation, bool(config.causal))
        head = backbone.head_parameters()
        check_head(backbone, head)
        if config.context is not None:
            backbone.context = Context(backbone, config.context)
        convert(backbone, config.backbone_dtype)
        hooks_of(backbone)  # torch.compile traces those that are there
        # the base can be read, and the side network is made; now they become one model
        super().__init__(config)
        self.backbone = backbone
        self.base = base
        self.side = side.to(backbone.device)
        self.side_run: type[SideRun] = SideRun  # the class of a pass of the side network
        self.feature_cache: FeatureCache | None = None
        self._known: Known = None  # while `knowing` is entered
        self._follow_base()
        self._freeze_but(head, adapters)
        self.post_init()
        # ties are between frozen weights, and the base keeps them; save_pretrained and the Trainer read these names
        self.all_tied_weights_keys: dict[str, str] = {}
        self._keys_to_ignore_on_save = self.state_dict().keys() - self._trained
        self.train(base.training)

    def _follow_base(self) -> None:
        """Tell transformers what it asks of a model as the base would: its input, loss, task and generation."""
        backbone = self.backbone
        self.main_input_name = backbone.input_name
        self.loss_type = getattr(backbone.core, "loss_type", None)  # by which the Trainer knows that labels are shifted
        self._generates = probe(backbone).predicts
        if self._generates:
            self.generation_config = copy.deepcopy(backbone.core.generation_config)
            self.generation_config.cache_implementation = None  # a `LadderCache` takes its place
        agree_on_problem(self.config, backbone)
        describe_base(self.config, backbone)

    def _freeze_but(self, head: dict[str, nn.Parameter], adapters: dict[str, nn.Parameter]) -> None:
        """Freeze the base but for these parameters, let it compute as a frozen one, and note the names of what trains.

        That is the names of all that is saved.
        """
        self.base.requires_grad_(False)
        if self.config.pack_weights:
            pack(self.backbone)
        fuse_any_head(self.base)
        warn_of_shared_head(self, head.values())
        self.adapters = {f"base.{name}": parameter for name, parameter in adapters.items()}
        self.gradients_from = self.backbone.layer_of(adapters.values())  # see `LadderPass`
        for parameter in (*head.values(), *adapters.values()):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)
        self._trained = {f"base.{name}" for name in (*head, *adapters, *self.backbone.head_buffers())}
        self._trained |= {f"side.{name}" for name in self.side.state_dict()}

    def _get_name(self) -> str:
        """Beside a decoder the name of its class: by that `transformers.Trainer` smooths the labels of next words."""
        return self.backbone.class_name if self._generates else super()._get_name()

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the loss is divided by the Trainer's `num_items_in_batch`: where that of a decoder is."""
        inputs = inspect.signature(self.backbone.core.forward).parameters.values()
        return self._generates and any(each.kind is each.VAR_KEYWORD for each in inputs)  # as transformers tells it

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "peft_config":  # which PEFT sets where it has put an adapter
            check_adapters_around(self, self._trained)
        super().__setattr__(name, value)

    def init_weights(self) -> None:
        """Nothing: the base comes initialised, and the side network's layers initialise themselves."""

    @property
    def base_model(self) -> Any:
        """The base; beside a decoder a pass without its head of words, see `StatesOnly`."""
        return StatesOnly(self) if self._generates else super().base_model

    def get_output_embeddings(self) -> nn.Module | None:
        """The base's LM head; None where it has none."""
        return self.backbone.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.core.set_output_embeddings(new_embeddings)

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.core.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        decoder: nn.Module = self.backbone.core.get_decoder()
        return decoder

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: no file of a side network holds the new words, and they would stay as they are drawn."""
        raise FastpeftError(
            "resize_token_embeddings on a LadderModel: the base is frozen and not saved. Resize and save the base "
            "first, and make the LadderModel of it then."
        )

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.backbone.core.get_input_embeddings()
        return embeddings

    def train(self, mode: bool = True) -> LadderModel:
        """Set the side network, the head and an adapter that trains to this mode; the backbone stays in evaluation."""
        super().train(mode)
        self._keep_in_evaluation()
        parameters = (each for module in self.backbone.frozen for each in module._parameters.values())
        thawed = mode and any(each is not None and each.requires_grad for each in parameters)
        if thawed and not (self.adapters or self._warned_of_thawed):
            self._warned_of_thawed = True
            logger.warning(
                "parameters of the backbone require gradients, but none come to them, and they are not saved. Call "
                "requires_grad_(False) on them; to train in the backbone, put an adapter into it and set train_adapters"
            )
        return self

    def _keep_in_evaluation(self) -> None:
        """Put the backbone into evaluation mode, but for an adapter that trains."""
        adapter = self.backbone.adapter_modules() if self.adapters else set()
        for module in self.backbone.frozen:
            module.training = self.training and module in adapter  # its children may belong to the head

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT's models do."""
        train, total = count_parameters(self)
        print(f"trainable params: {train:,d} || all params: {total:,d} || trainable%: {100 * train / total:.4f}")

    # -- forward -------------------------------------------------------------------------------------------------

    @WithInputsOfBase
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base model returns: `logits`, and `loss` if labels are given; without a head `last_hidden_state`.

        Args:
            args, kwargs: the fields of `fastpeft.ladder.LadderInputs`, in their order or by name, such as `input_ids`,
                `attention_mask` and `labels`; and other inputs that the base's forward names.

        Raises:
            FastpeftError: the features do not have the shape of the input, the base was copied or replaced, texts are
                joined in a row, the base does not take an input, or a cache is asked for that it cannot have.
        """
        given, backbone = LadderInputs.of(*args, **kwargs), self.backbone
        if backbone.model is not self.base:
            raise FastpeftError(
                "the base is not the module that this LadderModel was made with. nn.DataParallel copies it: use one "
                "GPU, or a process per GPU by torchrun. If you replaced it, make a new LadderModel."
            )
        loss = {_DIVISOR: given.others.pop(_DIVISOR)} if _DIVISOR in given.others and self.accepts_loss_kwargs else {}
        cache = cache_of_pass(backbone, given, self.training)
        given.check(backbone, 0 if cache is None else cache.get_seq_length(), joined=not self.config.causal)
        self._warn_of_no_gradient(given)
        self._share_padding()
        if given.output_hidden_states is None:
            given.output_hidden_states = self.config.output_hidden_states
        outputs, run = self.run_base(given, cache, **loss)
        self._take_problem()
        outputs = with_own_cache(outputs, cache)
        if run.states:
            outputs["hidden_states"] = tuple(run.states)
        as_dict = self.config.return_dict if given.return_dict is None else given.return_dict
        return outputs if as_dict else outputs.to_tuple()

    def run_base(self, given: LadderInputs, cache: LadderCache | None = None, **options: Any) -> tuple[Any, SideRun]:
        """A pass of the base with the side network's output in place of its encoder's.

        Args:
            given: the inputs.
            cache: of the tokens before these, which the pass extends.
            options: other arguments of the base.

        Returns:
            What the base returned, and the pass of the side network.
        """
        backbone = self.backbone
        arguments = given.for_base(backbone, cache, router_logits=None if self.adapters else False)
        run = self._new_side_run(given, cache)
        known = self._known
        # features of tokens that follow others, or stand beside an image or the like, are those of no row
        alone = cache is None and given.pixel_values is None and all(each is None for each in given.others.values())
        if known is None and alone and self.feature_cache is not None:
            known = self.feature_cache.features(arguments)
        called = backbone.after_context(arguments)
        with LadderPass(backbone, run, arguments, self.gradients_from).around_base(known):
            outputs = self.base(**called, **options, return_dict=True)
        return outputs, run

    def _warn_of_no_gradient(self, given: LadderInputs) -> None:
        """Warn once where what asks for a gradient, such as a soft prompt, is read, and none comes to it."""
        read = given.read
        if read is None or not read.requires_grad or self._warned_of_inputs or self.gradients_from == 0:
            return
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warned_of_inputs = True
            logger.warning(
                "the input of a LadderModel requires a gradient, but none comes to it, since nothing is propagated "
                "back through the backbone: what made it does not train. Train that without a side network, as by "
                "SiVA, or call detach() on the input"
            )

    def _share_padding(self) -> None:
        """Tell the base's head, which reads its own configuration, the padding that trainers have put into ours."""
        padding = getattr(self.config, "pad_token_id", None)
        if padding is not None and getattr(self.backbone.text_config, "pad_token_id", None) != padding:
            self.backbone.text_config.pad_token_id = padding

    def _take_problem(self) -> None:
        """Note which problem the base's head saw in its first labels: pipelines read it in our configuration."""
        problem = getattr(self.backbone.core.config, "problem_type", None)
        if problem not in (None, self.config.problem_type):
            self.config.problem_type = problem

    def _new_side_run(self, given: LadderInputs, cache: LadderCache | None) -> SideRun:
        """A new pass of the side network, with what it drops drawn from torch's random state."""
        if self.backbone.body.training:  # by `base.train()`, or a loop over all modules
            self._keep_in_evaluation()
        device = self.side.up.weight.device
        mask = None if given.attention_mask is None else given.attention_mask.to(device).bool()
        seed: int | Tensor = 0
        blocks_seed = 0
        if self.training and (self.config.dropout or self.config.layer_drop):
            # on a GPU it is drawn there, so that a CUDA graph draws anew at each replay
            seed = torch.randint(2**63 - 1, (), device=device if device.type == "cuda" else "cpu").to(device)
        if self.training and self.config.layer_drop:
            blocks_seed = int(torch.randint(2**63 - 1, ()))
            if torch.is_grad_enabled():  # or each process would wait for gradients that others do not have
                blocks_seed = agreed(blocks_seed, device)
        side_cache = None if cache is None else cache.sides[0]
        text = given.text
        step = cache is not None and cache.get_seq_length() > 0 and text is not None and text.shape[1] == 1
        keeps = bool(given.output_hidden_states)
        return run_of(self.side, mask, side_cache, step, keeps, seed, blocks_seed, self.side_run)

    @contextlib.contextmanager
    def knowing(self, known: Known) -> Iterator[None]:
        """While the block runs, passes take their features, or the side network's output, from `known`."""
        self._known = known
        try:
            yield
        finally:
            self._known = None

    # -- generation ----------------------------------------------------------------------------------------------

    def can_generate(self) -> bool:
        """Whether the base is a decoder with an LM head, so that `generate` works."""
        return self._generates

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Generate text beside a decoder, as `generate` of transformers does: greedy, by sampling or by beam search.

        It runs in evaluation mode, whatever the mode is. Backbone and side network keep what they need of earlier
        tokens, so each new token is one pass over itself: see `fastpeft.ladder.LadderCache`.

        Args:
            inputs: token ids `(B, T)`, as `input_ids`; or give `inputs_embeds` `(B, T, d)`.
            generation_config: None is at first that of the base.
            args, kwargs: as for `GenerationMixin.generate`, such as `attention_mask`, `max_new_tokens`, `do_sample`,
                `num_beams` and `streamer`. Pad several prompts on the left.

        Returns:
            Token ids `(B, T)`, the prompt first, or what `return_dict_in_generate` asks for.

        Raises:
            FastpeftError: the base does not generate text, or a cache is asked for that the model cannot have.

        Example:
            >>> model.generate(**tokenizer("The sea", return_tensors="pt"), max_new_tokens=20)  # doctest: +SKIP
        """
        check_generates(self.backbone)
        if self.side_run is not SideRun:  # one that keeps nothing
            kwargs.setdefault("use_cache", False)
        kwargs = with_cache(partial(LadderCache, self.backbone), kwargs, generation_config, self.generation_config)
        with in_eval_mode(self.modules()):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """The arguments of a pass, as the base prepares them for its own; transformers looks for `inputs_embeds`."""
        prepared = prepare_pass(self.backbone.core, input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        return {name: value for name, value in prepared.items() if name not in OTHER_CACHES}

    # what else `generate` asks of a model: one that sees images has places of its own for them, and encodes them once

    def _prepare_position_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.core._prepare_position_ids_for_generation(*args, **kwargs)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.core._maybe_prepare_encoder_kwargs_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.core._expand_inputs_for_generation(*args, **kwargs)

    @overload
    def cache_features(self, folder: None, max_bytes: int | None = ...) -> None: ...

    @overload
    def cache_features(self, folder: str | os.PathLike[str], max_bytes: int | None = ...) -> FeatureCache: ...

    def cache_features(
        self, folder: str | os.PathLike[str] | None, max_bytes: int | None = None
    ) -> FeatureCache | None:
        """From now on read the backbone's features from a folder, and run the backbone only on new rows.

        Results differ only by the rounding of features to bfloat16, which applies to new rows too. The last bits of a
        row's features depend on the batch in which they were computed, so a run repeats to the bit on the same folder
        or a new one, otherwise to rounding. A pass on `inputs_embeds`, or with images or `others` beside a text, does
        not use the cache.

        Args:
            folder: made if need be. Side networks, backbones, runs and processes may share it. None ends caching.
            max_bytes: the most that the folder may take; rows that do not fit are computed each time. None is half of
                the sum of what it takes and its disk has free.

        Returns:
            The cache, whose `hits` and `misses` count rows; None if `folder` is None.

        Raises:
            FastpeftError: an argument cannot be used, the folder cannot be written, or the base reads no tokens.

        Notes:
            A token takes `2 (L + 1) d` bytes. A backbone with changed weights has features of its own, but a change
            through `.data` is not noticed. So have another dtype of autocast and another version of transformers. A
            damaged record is computed again.

        Example:
            >>> model.cache_features("features")  # doctest: +SKIP
        """
        self.feature_cache = None
        if folder is not None:
            if self.adapters:
                raise FastpeftError(
                    "an adapter in the backbone trains too (train_adapters), so its features change at every step and "
                    "cannot be cached. Use only one of the two."
                )
            self.feature_cache = FeatureCache(self.backbone, folder, max_bytes)
        return self.feature_cache
