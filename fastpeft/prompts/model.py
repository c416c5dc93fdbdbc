"""A language model as a classifier by a prompt: by a masked word, or by the next word of a decoder."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import cached_file, find_adapter_config_file

from fastpeft.data.batches import compute_by_length
from fastpeft.data.token_rows import TokenRow
from fastpeft.errors import FastpeftError
from fastpeft.models import LoadedModel, is_causal_lm, load_language_model, longest_input, masked_lm_head_layers
from fastpeft.ops.dtypes import keeping_dtypes
from fastpeft.prompts.template import PROMPT_FILE, Prompt, Text, is_of_decoder
from fastpeft.support import files
from fastpeft.support.adapter_files import WEIGHTS, check_adapter
from fastpeft.support.eval_mode import in_eval_mode
from fastpeft.support.hub import HUB_ARGUMENTS, OWN_ATTENTION, source_options


@dataclass
class PromptCollator(DataCollatorWithPadding):
    """Pads rows of `Prompt.encode` to a batch, as `DataCollatorWithPadding` does.

    Rows with `mask_positions` are padded on the right, also for a tokenizer that pads on the left: that would move the
    tokens, and a model with learned positions would answer a text otherwise than alone.
    """

    def __call__(self, features: list[TokenRow]) -> Any:
        if self.tokenizer.padding_side == "right" or "mask_positions" not in features[0]:
            return super().__call__(features)
        right = copy.copy(self)
        right.tokenizer = copy.copy(self.tokenizer)
        right.tokenizer.padding_side = "right"
        return right(features)


class PromptModel(PreTrainedModel):
    """A language model as a classifier: its logits are those of the label words at the mask.

        logits[b, c] = masked_lm(input_ids[b])[mask position of b, token of word c]

    It trains in transformers.Trainer as it is, on rows of `prompt.encode`. Of the vocabulary's logits, only those at
    the mask are computed: `(B, vocabulary)` in place of `(B, T, vocabulary)`. A decoder has no mask: a row is the line
    up to it, and the position is that of the last token, whose logits are those of the next word.

    Args:
        masked_lm: a transformers model with a masked-word head, or a decoder with its LM head, alone,
            wrapped by PEFT or beside a side network; used as it is, not copied.
        tokenizer: its tokenizer; of a decoder one without a mask token, with a padding token.
        prompt: template and label words.
        calibrate: call `calibrate()` at once.

    Raises:
        FastpeftError: the model has no head for words, or has an encoder and a decoder; its tokenizer is not of its
            kind; or a label word is not one token.

    Notes:
        Adapters go around it or inside it: `get_peft_model(PromptModel(...), SivaConfig())` has everything that PEFT
        and the Trainer do with checkpoints, but saves the adapter alone (`prompt.save` keeps the prompt).
        `PromptModel(get_peft_model(masked_lm, SivaConfig()), ...)` saves both, as an adapter that fits the plain masked
        model, but cannot resume from the Trainer's checkpoints. Vectors before the tokens, as of prompt tuning, go
        inside it: around it PEFT would not move `mask_positions` with the tokens.

    Example:
        >>> prompt = Prompt("{text} It was <mask>.", {0: "terrible", 1: "great"})
        >>> model = PromptModel(masked_lm, tokenizer, prompt)  # doctest: +SKIP
        >>> rows = prompt.encode(tokenizer, ["Good fun.", "A bore."], labels=[1, 0])  # doctest: +SKIP
        >>> Trainer(model, train_dataset=rows, data_collator=PromptCollator(tokenizer)).train()  # doctest: +SKIP
    """

    base_model_prefix = "masked_lm"
    supports_gradient_checkpointing = True
    # the attention of the model inside was settled when it was made
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, masked_lm: nn.Module, tokenizer: Any, prompt: Prompt, *, calibrate: bool = False) -> None:
        core = find_core(masked_lm)
        _check(core, masked_lm, tokenizer, prompt)
        config: Any = copy.deepcopy(masked_lm.config)
        config.id2label = dict(enumerate(prompt.labels))
        config.label2id = {label: index for index, label in enumerate(prompt.labels)}
        super().__init__(config)
        self.masked_lm: Any = masked_lm  # its name is in checkpoints
        self.training = masked_lm.training  # not train(), which would change the modules in it
        self.tokenizer = tokenizer
        self.prompt = prompt
        tokens = prompt.label_ids(tokenizer)
        label_ids = torch.tensor(tokens, device=self.device)
        words = getattr(core.config.get_text_config(), "vocab_size", None)
        if words is not None and max(tokens, default=0) >= words:
            raise FastpeftError(
                f"a label word is a token that {type(core).__name__}, which knows {words:,}, does not have. Give the "
                "tokenizer that belongs to the model, or call its resize_token_embeddings(len(tokenizer)) first."
            )
        self.register_buffer("label_ids", label_ids, persistent=False)  # (classes,)
        # log-probabilities of the label words for an empty text, or zeros (classes,)
        self.register_buffer("calibration", torch.zeros(len(label_ids), device=self.device))
        self.register_load_state_dict_pre_hook(_rename_plain)
        unsaved = getattr(masked_lm, "_keys_to_ignore_on_save", None) or ()  # a side network's backbone, to the Trainer
        self._keys_to_ignore_on_save = {f"masked_lm.{name}" for name in unsaved} or None
        if calibrate:
            self.calibrate()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """As the attention of the model inside, how its experts compute was settled when it was made."""
        return True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mask_positions: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits of the classes, and their cross entropy where labels are given.

        Args:
            input_ids: `(B, T)`.
            attention_mask: `(B, T)`, 1 where a token is.
            token_type_ids: `(B, T)`, for models that have segments.
            inputs_embeds: `(B, T, d)` in place of `input_ids`; needs `mask_positions`.
            mask_positions: `(B,)`, index of each row's mask, of a decoder that of its last token. None: it is looked
                for, the one mask token of each row or the last token that the attention mask has.
            labels: `(B,)`, index of each row's class.
            position_ids: `(B, T)`, for models that take them.
            output_attentions, output_hidden_states, return_dict: as everywhere in transformers.

        Returns:
            `loss` (a scalar, float32) and `logits` `(B, classes)` in float32.

        Raises:
            FastpeftError: `mask_positions` is None and a row has no mask token or several; or a tokenizer pads on the
                left and they point elsewhere.
        """
        if mask_positions is None:
            mask_positions = self._find_masks(input_ids, attention_mask)
        elif self.tokenizer.padding_side == "left" and type(input_ids) is Tensor and not torch.compiler.is_compiling():
            self._check_masks(mask_positions, input_ids, attention_mask)
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            "position_ids": position_ids,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "use_cache": False if is_of_decoder(self.tokenizer) else None,
        }
        given = inputs_embeds if input_ids is None else input_ids
        length = 0 if given is None else given.shape[1]  # of nothing the model inside says that it needs something
        with _only_masks(self.core, mask_positions, length):
            output = self.masked_lm(
                **{name: value for name, value in arguments.items() if value is not None}, return_dict=True
            )
        scores = output.logits
        # a model that hides its encoder has computed all positions
        scores = scores[:, 0] if scores.shape[1] == 1 else _at(scores, mask_positions, length)[:, 0]
        logits = scores.index_select(-1, self.label_ids).float() - self.calibration
        loss = None if labels is None else F.cross_entropy(logits, labels)
        # some models have none, as Mamba has no attentions
        result = SequenceClassifierOutput(loss, logits, output.get("hidden_states"), output.get("attentions"))
        return result.to_tuple() if return_dict is False else result

    def _check_masks(self, positions: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Raise `FastpeftError` where positions are not those of masks: padding on the left has moved the tokens."""
        if is_of_decoder(self.tokenizer):
            fit = positions == self._find_masks(input_ids, attention_mask)
        else:
            fit = input_ids.gather(1, positions[:, None]) == self.tokenizer.mask_token_id
        if not bool(fit.all()):
            raise FastpeftError(
                "mask_positions are not where the masks stand, as this tokenizer pads on the left. Make batches by "
                "fastpeft.PromptCollator (data_collator=PromptCollator(tokenizer)), which pads on the right."
            )

    def _find_masks(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if input_ids is None:
            raise FastpeftError("inputs_embeds do not show where the masks are; give mask_positions too.")
        if is_of_decoder(self.tokenizer):
            present = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return input_ids.shape[1] - 1 - present.flip(-1).int().argmax(-1)
        masks = input_ids == self.tokenizer.mask_token_id
        if not bool((masks.sum(-1) == 1).all()):
            raise FastpeftError(
                "a row has no mask token or several, and mask_positions are not given. Make the rows by "
                "prompt.encode(...), or pass mask_positions."
            )
        return masks.int().argmax(-1)

    @torch.no_grad()
    def calibrate(self) -> PromptModel:
        """Subtract from now on what the words score for an empty text, with the weights as they are now.

        A model that favours one word whatever the text (as most do) is even-handed after this: "contextual calibration"
        of Zhao et al. 2021, "Calibrate before use". Save and load keep it.
        """
        self.calibration.zero_()
        empty = ("", "") if self.prompt.is_pair else ""
        self.calibration.copy_(self.predict_logits([empty])[0].log_softmax(-1))
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> PromptModel:
        super()._apply(keeping_dtypes(fn, [self.calibration]), recurse)  # logits are float32, whatever the model is
        return self

    def read_tokens(self, tokens: Sequence[int]) -> PromptModel:
        """Let the logits be those of any `tokens` from now on, in place of the label words'; uncalibrated.

        For looking at what a model expects at the mask, as the search for label words does.
        """
        self.label_ids = torch.tensor(tokens, device=self.device)  # (tokens,)
        self.calibration = torch.zeros(len(tokens), device=self.device)
        return self

    def predict_logits(self, texts: Sequence[Text], *, batch_size: int = 64, max_length: int | None = None) -> Tensor:
        """Logits of texts or pairs, `(rows, classes)` in float32 on the model's device, in evaluation mode.

        With no training before it, this is zero-shot classification.
        """
        own = getattr(getattr(self.masked_lm, "active_peft_config", None), "num_virtual_tokens", None) or 0
        most = longest_input(self.core, self.tokenizer) - own
        limit = most if max_length is None else min(max_length, most)
        return self.logits_of(self.prompt.encode(self.tokenizer, texts, max_length=limit), batch_size)

    @torch.no_grad()
    def logits_of(self, rows: Sequence[TokenRow], batch_size: int = 64, tokens: int | None = None) -> Tensor:
        """As `predict_logits`, of texts that the prompt has encoded, at most so many `tokens` together."""
        if batch_size < 1:
            raise FastpeftError(f"batch_size is {batch_size}; allowed is 1 or more.")
        collate = PromptCollator(self.tokenizer)
        logits = torch.empty(len(rows), len(self.label_ids), device=self.device)

        def compute(chosen: list[int]) -> None:
            logits[chosen] = self(**collate([rows[index] for index in chosen]).to(self.device)).logits

        with in_eval_mode(self.modules()):
            compute_by_length(compute, rows, batch_size, tokens)
        return logits

    @property
    def core(self) -> Any:
        """The language model without wrappers."""
        return find_core(self.masked_lm)

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the head's layers without the vocabulary's: of a masked-word head the dense layer and the norm."""
        return masked_lm_head_layers(self.core, self)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.core.get_input_embeddings()
        return embeddings

    def get_output_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.core.get_output_embeddings()
        return embeddings

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the vocabulary of the model inside, as it does itself."""
        resize = getattr(self.masked_lm, "resize_token_embeddings", self.core.resize_token_embeddings)
        resized: nn.Module = resize(*args, **kwargs)
        self.config.get_text_config().vocab_size = self.core.config.get_text_config().vocab_size
        return resized

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.core.tie_weights(*args, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save the model inside (or its adapter) as it saves itself, the tokenizer, and the prompt in `prompt.json`.

        So the folder is that of a plain language model too.
        """
        if state_dict is not None:
            of_inside = {name: value for name, value in state_dict.items() if name != "calibration"}
            kwargs["state_dict"] = {name.removeprefix("masked_lm."): value for name, value in of_inside.items()}
        self.masked_lm.save_pretrained(save_directory, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        self.tokenizer.save_pretrained(save_directory)
        values = {**self.prompt.values(), "calibration": self.calibration.tolist() if self.calibration.any() else None}
        files.write_json(Path(save_directory) / PROMPT_FILE, values)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        masked_lm: nn.Module | None = None,
        **kwargs: Any,
    ) -> PromptModel:
        """Load what `save_pretrained` wrote, from a folder or the hub.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            masked_lm: the model inside. None: what is there, a plain model, or a PEFT adapter or a side network, whose
                base model is loaded too.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` and `subfolder` say where the
                files are, of an adapter not its base's; all others, such as `dtype`, go to `from_pretrained` of
                `AutoModelForMaskedLM` or `AutoModelForCausalLM`. Without `dtype` transformers takes that of the
                files, and a base that was trained on in float32 may be saved in half precision: give what it had.

        Raises:
            FastpeftError: what is there is no prompt, or a `masked_lm` and arguments for loading one are given.
            OSError: transformers does not find a file.
        """
        from transformers import AutoTokenizer

        source = os.fspath(pretrained_model_name_or_path)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        if masked_lm is not None and kwargs:
            raise FastpeftError(
                f"from_pretrained got a masked_lm and {', '.join(kwargs)}, which are for loading one. Leave out either."
            )
        options = _options(source, hub)
        hub["local_files_only"] = options["local_files_only"]
        values = files.read_json(Path(cached_file(source, PROMPT_FILE, **hub)))
        if masked_lm is None:
            adapter = find_adapter_config_file(source, **hub)
            if adapter is None:
                masked_lm = _load_plain(source, hub, **kwargs)
            else:
                if not Path(source).is_dir():
                    cached_file(source, WEIGHTS, **hub)  # beside it in the cache
                masked_lm = _load_adapter(Path(adapter).parent, **kwargs)
        model = cls(masked_lm, AutoTokenizer.from_pretrained(source, **options), Prompt.from_values(values))
        if values.get("calibration"):
            model.calibration.copy_(torch.tensor(values["calibration"]))
        return model.eval()


def _check(core: Any, model: Any, tokenizer: Any, prompt: Any) -> None:
    """Raise `FastpeftError` where model, tokenizer and prompt do not fit; `core` is what `find_core` found."""
    if not isinstance(prompt, Prompt):
        raise FastpeftError(f"the prompt is {prompt!r:.100}, a {type(prompt).__name__}. Give a fastpeft.Prompt.")
    if hasattr(model, "_orig_mod"):
        raise FastpeftError("the model is compiled. Compile what is around it: torch.compile(PromptModel(...)).")
    if prompt.head != "label_words":
        raise FastpeftError(
            f"a prompt with head={prompt.head!r} needs no PromptModel, which reads label words. Train a model with "
            'a classification head on prompt.encode(...), or take head="label_words".'
        )
    if core is None or getattr(core.config, "is_encoder_decoder", False):
        raise FastpeftError(
            f"{type(core or model).__name__} {'has no LM head' if core is None else 'has an encoder and a decoder'}, "
            "and label words are read from a masked language model or from a decoder. Load one by AutoModelForMaskedLM "
            "or AutoModelForCausalLM, or train a classification head on what a Prompt with head='classifier' encodes."
        )
    if _fills_masks(core) == is_of_decoder(tokenizer):
        raise FastpeftError(
            f"{type(core).__name__} {'fills masks' if _fills_masks(core) else 'is a decoder, which fills no masks'}, "
            f"and its tokenizer has the mask token {tokenizer.mask_token!r}. Give the tokenizer of the model; of a "
            "decoder set tokenizer.mask_token = None, before rows are encoded too."
        )


def find_core(model: Any) -> Any:
    """The language model inside wrappers, None if there is none."""
    while True:
        if hasattr(model, "get_base_model"):  # before names are asked: PEFT's may end as those of what they wrap
            model = model.get_base_model()
        if _fills_masks(model) or _is_decoder(model):
            return model
        inside = getattr(model, "base_model", model)
        if inside is model:
            return None
        model = inside


def _fills_masks(model: Any) -> bool:
    name = type(model).__name__
    return name.endswith("ForMaskedLM") or name in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()


def _is_decoder(model: Any) -> bool:
    name = type(model).__name__
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return (name.endswith("ForCausalLM") or name in names) and is_causal_lm(model.config)


def inside_prompt(model: Any) -> Any:
    """What a prompt was put around, or the model itself where there is none."""
    return model.masked_lm if isinstance(model, PromptModel) else model


def around(model: Any, wrap: Callable[[Any], Any]) -> Any:
    """What `wrap` makes of a model; of a prompted one, the prompt on what it makes of the model inside.

    That prompt is not calibrated.
    """
    if isinstance(model, PromptModel):
        return PromptModel(wrap(model.masked_lm), model.tokenizer, model.prompt)
    return wrap(model)


def holds_label_words(source: str) -> bool:
    """Whether a prompt with label words was saved in a folder, or under what a hub id names.

    Raises:
        FastpeftError: what is there is no prompt.
    """
    try:
        file = cached_file(source, PROMPT_FILE)
    except OSError:  # a classifier, with or without a prompt that only fills its texts in
        return False
    return Prompt.from_values(files.read_json(Path(file))).head == "label_words"


def load_prompted(model: str, prompt: Prompt, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load `model` with its head for words in `dtype`, as a classifier by the label words of `prompt`.

    Raises:
        FastpeftError: as `load_language_model`, or a label word is not one token.
    """
    prompted = PromptModel(*load_language_model(model, dtype), prompt)
    return LoadedModel(prompted, prompted.tokenizer, prompted.head_modules, trains_head=False)


def _at(states: Tensor, positions: Tensor, length: int) -> Tensor:
    """Of `states` `(B, T, ...)`, each row's at its position: `(B, 1, ...)`.

    Args:
        states: of `length` tokens, after those of vectors that PEFT put before them, as prompt tuning does.
        positions: `(B,)`, among the tokens.
        length: how many tokens a row has.
    """
    positions = positions.to(states.device) + (states.shape[1] - length)
    return states[torch.arange(len(states), device=states.device), positions].unsqueeze(1)


@contextmanager
def _only_masks(model: Any, positions: Tensor, length: int) -> Iterator[None]:
    """Within, the head of `model` gets its encoder's output at `positions` among `length` tokens only.

    Heads for words work position by position, so the result at a mask is the same. An encoder's output that is not
    `(B, T, d)`, as of an encoder that packs sequences, is left as it is.
    """
    encoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(encoder, nn.Module):
        yield
        return

    def keep_masks(module: nn.Module, args: Any, output: Any) -> Any:
        # replicas of nn.DataParallel share their hooks: each obeys its own
        if module is not encoder or output[0].dim() != 3 or len(output[0]) != len(positions):
            return output
        kept = _at(output[0], positions, length)
        if isinstance(output, tuple):
            return (kept, *output[1:])
        output[next(iter(output))] = kept
        return output

    handle = encoder.register_forward_hook(keep_masks)
    try:
        yield
    finally:
        handle.remove()


def _rename_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let the state dict of a plain language model load, as the checkpoints have it that `save_pretrained` writes."""
    inner, calibration = f"{prefix}masked_lm.", f"{prefix}calibration"
    for name in [name for name in state_dict if name.startswith(prefix) and not name.startswith(inner)]:
        if name != calibration:
            state_dict[inner + name.removeprefix(prefix)] = state_dict.pop(name)
    kept = state_dict.get(calibration)
    if kept is None or kept.shape != module.calibration.shape:  # of another prompt
        state_dict[calibration] = module.calibration


def _options(source: str, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a `from_pretrained` for `source`; `hub` holds some of `HUB_ARGUMENTS`."""
    return {**source_options(os.path.join(source, hub.get("subfolder") or "")), **hub}


def _load_plain(source: str, hub: Mapping[str, Any], **kwargs: Any) -> Any:
    """A language model alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    options = _options(source, hub)
    decoder = is_causal_lm(AutoConfig.from_pretrained(source, **options))
    auto_class: Any = AutoModelForCausalLM if decoder else AutoModelForMaskedLM
    return auto_class.from_pretrained(source, **{**options, **OWN_ATTENTION, "use_safetensors": True, **kwargs})


def _load_adapter(folder: Path, **kwargs: Any) -> Any:
    """A PEFT adapter in a local folder on its base model, of the revision that the adapter names."""
    from peft import PeftConfig, PeftModel

    check_adapter(folder)
    with safe_open(folder / WEIGHTS, "pt") as file:
        if any(".masked_lm." in key for key in sorted(file.keys())):
            raise FastpeftError(
                f"the adapter in {str(folder)!r} was put around a PromptModel, not inside it. Load it by PeftModel."
                "from_pretrained(PromptModel(base, tokenizer, Prompt.load(folder)), folder)."
            )
    config = PeftConfig.from_pretrained(str(folder))
    base = _load_plain(config.base_model_name_or_path, {"revision": config.revision or "main"}, **kwargs)
    return PeftModel.from_pretrained(base, str(folder))
