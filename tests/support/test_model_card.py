"""The text of model cards."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastpeft.support.model_card import model_card
from fastpeft.training.results import memory


@pytest.mark.parametrize("base_model", ["roberta-base", "", None])
def test_the_header_names_a_base_model_that_is_known_only(base_model: str | None) -> None:
    header = model_card(base_model=base_model, method="SiVA", snippet="").split("---")[1]
    assert ("base_model: roberta-base" in header) is (base_model == "roberta-base")
    assert ("base_model" in header) is bool(base_model)
    assert "library_name: peft" in header


@pytest.mark.parametrize("base_model", ["models/mine", "/models/mine", "../mine", "the base model", "demo"])
def test_the_header_names_no_base_model_that_no_hub_has(
    base_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    card = model_card(base_model=base_model, on_hub=base_model != "demo", method="SiVA", snippet="")
    assert "base_model" not in card.split("---")[1]
    assert f"# SiVA of {base_model}\n" in card


def test_memory_of_a_card_is_the_allocators_and_older_files_hold_no_resident_peak() -> None:
    metrics = {"peak_memory_mb": 1310.2, "peak_memory_source": "CUDA allocator", "peak_rss_mb": 2000.0}
    assert memory(metrics) == {"peak memory of a step": "1,310 MB (CUDA allocator)"}
    simulated = {"peak_memory_mb": None, "peak_memory_source": "simulated"}
    assert memory(simulated) == {"peak memory of a step": "-"}
    assert memory({**simulated, "peak_rss_mb": None}) == memory(simulated)
