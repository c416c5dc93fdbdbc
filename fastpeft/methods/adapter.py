"""Methods that put an adapter of PEFT, or SiVA's, onto the model, and save that alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpeft.errors import FastpeftError
from fastpeft.methods.method import Method
from fastpeft.methods.preparation import Preparation
from fastpeft.support.adapter_files import check_adapter
from fastpeft.support.model_card import loading_snippet


@dataclass(frozen=True, kw_only=True)
class AdapterMethod(Method):
    """A method that saves a PEFT adapter.

    Attributes:
        config: the name of its configuration in PEFT, or of SiVA's.
        rank: the one where a person gives none; None: it has no rank.
        fields: makes, of the rank or of 0 where there is none, what the configuration is given beside it.
        by_mezo: what it is given too where MeZO trains it.
        merges: whether the adapter can become a part of its base's weights.
        four_bits: whether the base keeps its linear layers in 4 bits.
    """

    config: str
    rank: int | None = None
    fields: Callable[[int], dict[str, Any]] = lambda rank: {}
    by_mezo: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ("targets", "rank")
    merges: bool = True
    four_bits: bool = False

    library = "peft"
    saves_model = False

    def config_fields(self) -> dict[str, Any]:
        from fastpeft.methods.wrapping import settings

        return settings(self.config)

    def check(self, preparation: Preparation) -> None:
        if self.four_bits:
            from fastpeft.methods.wrapping import check_4_bits

            check_4_bits()

    def prepare(self, model: Any, preparation: Preparation) -> Any:
        from fastpeft.methods.wrapping import wrap

        rank = preparation.rank or self.rank or 0
        values = {**({"r": rank} if rank else {}), **self.fields(rank)}
        if self.zeroth_order:
            values |= self.by_mezo
        return wrap(self._base(model), preparation, self.config, values)

    def _base(self, model: Any) -> Any:
        """What the adapter is put onto."""
        if not self.four_bits:
            return model
        from fastpeft.methods.wrapping import in_4_bits

        return in_4_bits(model)

    def load(self, folder: Path, start: Callable[[], Any], whole: Callable[[], Any]) -> Any:
        from fastpeft.methods.saved_adapters import put_onto

        base = start()
        return dataclasses.replace(base, model=put_onto(self._base(base.model), folder))

    def load_checkpoint(self, model: Any, checkpoint: Path) -> None:
        check_adapter(checkpoint)
        model.load_adapter(str(checkpoint), model.active_adapter, is_trainable=True)

    def merge(self, model: Any, trained: str) -> Any:
        from fastpeft.methods.wrapping import merge

        self.check_merges(trained)
        return merge(model)

    def check_merges(self, trained: str) -> None:
        if not self.merges:
            raise FastpeftError(
                f"{trained} is {self.title}, which cannot become a part of its model's weights: no other run starts "
                "from it, and it has no merged form. Load it from its own folder, or choose another method."
            )

    def check_export(self, to: str, trained: str) -> None:
        if to != "lora":
            self.check_merges(trained)

    def loading_snippet(self, folder: str, *, chained: bool, **known: Any) -> str:
        return loading_snippet(folder, adapter=True, chained=chained or self.four_bits, **known)


_VIRTUAL_TOKENS = 10  # of a prompt, as PEFT's example of sequence classification has them


@dataclass(frozen=True, kw_only=True)
class PromptTuningMethod(AdapterMethod):
    """Vectors before the words of each text, which train."""

    config: str = "PromptTuningConfig"
    fields: Callable[[int], dict[str, Any]] = lambda _: {"num_virtual_tokens": _VIRTUAL_TOKENS}
    options: tuple[str, ...] = ()
    merges: bool = False

    def own_tokens(self, preparation: Preparation) -> int:
        count: int = preparation.settings.get("num_virtual_tokens", _VIRTUAL_TOKENS)
        if count < 1:
            raise FastpeftError(f"num_virtual_tokens is {count}; it must be a whole number from 1.")
        return count

    def check(self, preparation: Preparation) -> None:
        """Refuse a head whose outputs PEFT does not put right where it has put vectors before the words."""
        self.own_tokens(preparation)
        if preparation.by_words or preparation.task_type != "SEQ_CLS":
            raise FastpeftError(
                "prompt tuning is for a classification head that reads a text as a whole: not for tags of words, "
                "masked words or label words. Choose another method, or add --prompt-head classifier to a prompt."
            )

    def prepare(self, model: Any, preparation: Preparation) -> Any:
        """As any adapter, but refuse a decoder: its head reads the last token, which it finds by the ids of tokens.
        PEFT gives it vectors in their place, and it would read the padding of all but the longest text of a batch."""
        from fastpeft.models import is_causal_lm

        if is_causal_lm(model.config):
            raise FastpeftError(
                f"prompt tuning is for encoders: {type(model).__name__} classifies a text by its last token, and "
                "cannot tell that from padding behind vectors. Choose another method, such as siva or lora."
            )
        return super().prepare(model, preparation)
