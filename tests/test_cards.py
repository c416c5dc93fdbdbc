"""The text of model cards."""

from __future__ import annotations

import pytest

from fastpeft.cards import model_card


@pytest.mark.parametrize("base_model", ["roberta-base", "", None])
def test_the_header_names_a_base_model_that_is_known_only(base_model: str | None) -> None:
    header = model_card(base_model=base_model, method="SiVA", snippet="").split("---")[1]
    assert ("base_model: roberta-base" in header) is (base_model == "roberta-base")
    assert ("base_model" in header) is bool(base_model)
    assert "library_name: peft" in header
