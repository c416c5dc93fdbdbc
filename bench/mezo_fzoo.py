"""FZOO against plain MeZO on the bundled model: accuracy by the forward passes that were made for it.

    python -m bench.slices demo runs/slice --rows 2000 --dev-rows 1000
    python -m bench.mezo_fzoo runs/slice runs/fzoo --curve spsa-1 --learning-rate 1.5e-5 --forwards 4000
    python -m bench.mezo_fzoo runs/slice runs/fzoo --curve fzoo-8 --learning-rate 3e-7 --forwards 1000

Each call is one run with the prompt SST-2 and adds its points to `bench/data/mezo_fzoo.csv`, as each is measured; a run
that was cut off goes on when it is called again. The claim to test (arXiv 2506.09034): FZOO reaches MeZO's accuracy in
far fewer forwards; the bar here is a quarter. The rates in the table are those that were tried, for one seed, and
the accuracy of 1,000 dev rows has a standard error of 1.5 points, so the losses beside it tell more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bench.harness import DATA, machine, option_parser, put_row
from fastpeft import TrainConfig, train
from fastpeft.mezo.estimator import estimator_of

FILE = DATA / "mezo_fzoo.csv"
NOISE = {"spsa": "gaussian", "fzoo": "rademacher"}  # what the authors of each take


@dataclass(frozen=True)
class Curve:
    """How the steps of a run estimate, and at what rate."""

    estimator: str
    num_estimates: int
    learning_rate: float
    model: str = "demo"

    @property
    def forwards(self) -> int:
        """Forward passes a step."""
        return len(estimator_of({**vars(self), "noise": NOISE.get(self.estimator)}).points)

    def __str__(self) -> str:
        return f"{self.estimator}-{self.num_estimates}-{self.learning_rate:g}"

    def config(self, data: str, output: Path, forwards: int, points: int) -> TrainConfig:
        """A run of about that many forward passes, measured at that many points after the first."""
        every = max(1, round(forwards / self.forwards / points))
        return TrainConfig(
            output=str(output / str(self)),
            method="mezo",
            model=self.model,
            data=data,
            prompt="SST-2",
            learning_rate=self.learning_rate,
            max_steps=points * every,
            save_steps=every,
            metric="loss",  # of which the checkpoints are measured
            settings={
                "estimator": self.estimator,
                "num_estimates": self.num_estimates,
                "noise": NOISE[self.estimator],
            },
        )


class Points(TrainerCallback):
    """Puts what is measured into the table, in the place of the same point of an earlier run."""

    def __init__(self, curve: Curve, file: Path) -> None:
        self.curve = curve
        self.file = file
        self.ended = False  # after which the best checkpoint is measured, at whatever step that was

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        if self.ended:
            return
        curve = {
            "estimator": self.curve.estimator,
            "num_estimates": str(self.curve.num_estimates),
            "noise": NOISE[self.curve.estimator],
            "learning_rate": f"{self.curve.learning_rate:g}",
            "batch": str(args.train_batch_size),
            "step": str(state.global_step),
            "forwards": str(state.global_step * self.curve.forwards),
        }
        measured = {name: f"{metrics[f'eval_{name}']:.4f}" for name in ("accuracy", "loss")}
        put_row(self.file, {**curve, **measured, **machine(torch.device(args.device))}, key=curve)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("data", help="a slice, as above")
    parser.add_argument("output", type=Path, help="folder of the runs' folders")
    parser.add_argument("--curve", default="spsa-1", help="estimator and directions a step, as fzoo-8")
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--forwards", type=int, default=1000, help="forward passes of the run, about")
    parser.add_argument("--points", type=int, default=8, help="how often to measure")
    arguments = parser.parse_args()
    estimator, _, directions = arguments.curve.partition("-")
    curve = Curve(estimator, int(directions), arguments.learning_rate)
    config = curve.config(arguments.data, arguments.output, arguments.forwards, arguments.points)
    resume = Path(config.output).exists()
    train(config, resume=resume, callbacks=[Points(curve, FILE)])


if __name__ == "__main__":
    main()
