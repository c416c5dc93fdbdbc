"""The load test of the server counts answers, and finds wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import reviews, save_tiny_model, write_csv
from served import Server

from bench import serve as bench
from fastpeft import TrainConfig, train
from fastpeft.serving.tasks import Tasks

for name in ("fastapi", "uvicorn"):
    pytest.importorskip(name)


def test_each_answer_is_compared(tmp_path: Path) -> None:
    from fastpeft.serving.app import create_app

    model, data = save_tiny_model(tmp_path / "model"), write_csv(tmp_path / "reviews.csv", reviews(40))
    runs = {"one": str(tmp_path / "one")}
    train(TrainConfig(output=runs["one"], model=str(model), data=str(data), method="lst", max_steps=1))
    texts = [text for text, _ in reviews(8)]
    known = bench.expected(runs, texts)
    with Server(create_app(Tasks(runs))) as server:
        load = bench.drive(server.port, texts, known, 4, lambda asked: asked < 3)
        assert (len(load.seconds), load.wrong, load.refused) == (12, 0, 0)
        assert load.row(2.0)["requests_per_s"] == "6.0"
        others = {"one": [{label: p + 1e-3 for label, p in each.items()} for each in known["one"]]}
        assert bench.drive(server.port, texts, others, 1, lambda asked: asked < 3).wrong == 3
        assert bench.drive(server.port, texts, {"two": others["one"]}, 1, lambda asked: asked < 3).refused == 3
