"""What a method is: an entry of the registry, which decides all that differs between methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastpeft.errors import FastpeftError
from fastpeft.methods.preparation import Preparation
from fastpeft.methods.recipes import Recipe
from fastpeft.support.model_card import loading_snippet

OVER = "over"  # the setting of MeZO that names the method whose parameters it trains
OPTIONS = ("targets", "rank", "window", "reduction")  # of a run, for some methods only


@dataclass(frozen=True)
class EarlierRun:
    """A finished run from whose result another one starts.

    Attributes:
        name: what error messages call its folder.
        method, preparation: its method, by MeZO that whose parameters it trained, and what that was given.
        same_head: whether the head that it trained serves the later run.
        start, pretrained: load what it started from, and the model that both are of, with the head of the later run.
        result: loads the model that it left.
    """

    name: str
    folder: Path
    method: str
    preparation: Preparation
    same_head: bool
    start: Callable[[], Any]
    result: Callable[[], Any]
    pretrained: Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to fine-tune a model.

    Attributes:
        name: as given to `--method`.
        title: as written in a model card.
        description: one line.
        recipe: how it trains by default.
        zeroth_order: whether what it leaves to train is trained by MeZO, without gradients; a run then takes the fields
            of `MeZOConfig`.
        options: which of the options in `OPTIONS` it takes.
    """

    name: str
    title: str
    description: str
    recipe: Recipe
    zeroth_order: bool = False
    options: tuple[str, ...] = ()

    library: ClassVar[str] = "transformers"  # which loads what it saves
    frozen_features: ClassVar[bool] = False  # whether the backbone's features stay the same while it trains
    saves_model: ClassVar[bool] = True  # whether it saves the whole model, and not what it trained alone

    # -- before training -----------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """What `--set` takes for it, with the type of each."""
        return {**({OVER: str} if self.zeroth_order else {}), **self.config_fields()}

    def config_fields(self) -> dict[str, Any]:
        """Fields of its configuration that `--set` may give, with the type of each."""
        return {}

    def check(self, preparation: Preparation) -> None:
        """Raise `FastpeftError` where options or settings cannot be used with any model, or with such a head."""

    def own_tokens(self, preparation: Preparation) -> int:
        """How many tokens it adds to every text; texts are cut that much earlier."""
        return 0

    def examples(self, preparation: Preparation) -> int:
        """How many training rows stand in front of every text as examples; they are not trained on."""
        return 0

    @abstractmethod
    def prepare(self, model: Any, preparation: Preparation) -> Any:
        """Make a loaded model ready: set what trains, and return the module to train."""

    # -- files ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def load(self, folder: Path, start: Callable[[], Any], whole: Callable[[], Any]) -> Any:
        """The model of the finished run in a folder, as a `LoadedModel`.

        `start` loads one of what the run started from, and `whole` one of a whole model that the folder holds.
        """

    @abstractmethod
    def load_checkpoint(self, model: Any, checkpoint: Path) -> None:
        """Give a model that was prepared the weights of a checkpoint of its own run."""

    def resume(self, model: Any, checkpoint: Path) -> None:
        """Do what must be done before the Trainer itself loads a checkpoint."""

    # -- after training ------------------------------------------------------------------------------------------

    def merge(self, model: Any, trained: str) -> Any:
        """A trained model as a plain one, with what was trained in its own weights. Errors call that `trained`."""
        self.check_merges(trained)
        return model

    def check_merges(self, trained: str) -> None:
        """Raise `FastpeftError` where what was trained cannot become a part of its model's weights."""

    def check_export(self, to: str, trained: str) -> None:
        """Raise `FastpeftError` where a run's model cannot be exported to `to`."""
        if to == "lora":
            raise FastpeftError(
                f"{trained} trained a whole model ({self.title}); only a SiVA adapter is exported to lora. Export it "
                "to merged or onnx."
            )
        self.check_merges(trained)

    def check_successor(self, later: Method, run: EarlierRun) -> None:
        """Raise `FastpeftError` where a run by `later` cannot start from `run`, which this method made."""
        self.check_merges(f"the run in {run.name!r}")

    def start_later(self, run: EarlierRun, later: Preparation) -> Any:
        """The `LoadedModel` that a later run, which is given `later`, starts from.

        That is the pretrained model with the weights that `run`, by this method, left it.
        """
        from fastpeft.prompts.model import inside_prompt

        start = run.pretrained()
        trained = self.merge(run.result(), f"the run in {run.name!r}")
        if run.same_head:
            inside_prompt(start.model).load_state_dict(inside_prompt(trained).state_dict())
        else:  # of two kinds of head one may lack a pooler
            weights = inside_prompt(trained).base_model.state_dict()
            inside_prompt(start.model).base_model.load_state_dict(weights, strict=False)
        name_after(start.model, run.folder)
        return start

    def continue_later(self, model: Any, run: EarlierRun) -> None:
        """Give the prepared model of a later run what `run`, by this method, trained beside its backbone."""

    def loading_snippet(self, folder: str, *, chained: bool, **known: Any) -> str:
        """Python code that loads what a run saved; arguments as of `model_card.loading_snippet`."""
        return loading_snippet(folder, adapter=False, **known)


def name_after(model: Any, folder: Path) -> None:
    """Name a model after the run whose weights it has: what goes onto it names what it goes onto."""
    from fastpeft.prompts.model import inside_prompt

    for each in (model, inside_prompt(model)):
        each.name_or_path = each.config.name_or_path = str(folder.resolve())
