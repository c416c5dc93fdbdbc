"""Variants as written, the cells they stand for, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastpeft import CompareConfig, FastpeftError
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.variants import parse_variant, split_items
from fastpeft.config import TrainConfig


def config(*methods: str, output: str = "out", **changes: Any) -> CompareConfig:
    return CompareConfig(output=output, methods=methods, **changes)


def test_a_variant_as_written() -> None:
    assert parse_variant("siva") == ("siva", {}, None)
    text = "siva:targets=query+value:rank=8:learning_rate=1e-3:label_words=a:b+c:residual=implicit:adam_beta1=0.5"
    method, values, earlier = parse_variant(text)
    assert (method, earlier) == ("siva", None)
    assert values == {
        "targets": "query,value",
        "rank": 8,
        "learning_rate": 1e-3,
        "label_words": "a:b,c",
        "residual": "implicit",
        "adam_beta1": 0.5,
    }
    assert parse_variant("k-lst:window=5:init_from=lst:prompt=sst2:init_from=mezo") == (
        "k-lst",
        {"window": 5},
        "lst:prompt=sst2:init_from=mezo",
    )


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("prompt={text} A+ <mask>", "{text} A+ <mask>"),
        ('prompt="{a}? <mask>, {b}:rank=2"', "{a}? <mask>, {b}:rank=2"),
        ('prompt="a \\" {text}:init_from=b <mask>"', 'a " {text}:init_from=b <mask>'),
        ("prompt=It's {text} <mask>", "It's {text} <mask>"),
        ("learning_rate=1e+3", 1e3),
        ("targets=query+value", "query,value"),
        ('targets=".*(query|key)+"', ".*(query|key)+"),
        ('modules_to_save=["a"+"b+c"]', ["a", "b+c"]),
    ],
)
def test_a_value_as_written(written: str, value: Any) -> None:
    name = written.partition("=")[0]
    text = f"head:{written}:epochs=2:init_from=mezo"
    assert parse_variant(text) == ("head", {name: value, "epochs": 2}, "mezo")


def test_commas_in_quotes_join_nothing() -> None:
    prompts = split_items('none, "{a}? <mask>, {b}":label_words=Yes+No,sst2')
    assert prompts == ["none", '"{a}? <mask>, {b}":label_words=Yes+No', "sst2"]
    cell = config("mezo", prompts=prompts[1:2]).cells()[0]
    assert (cell.values["prompt"], cell.values["label_words"]) == ("{a}? <mask>, {b}", "Yes,No")
    assert cell.name == "mezo-prompt=-a-mask-b-label_words=Yes+No-seed0"


def test_cells_of_variants_and_seeds() -> None:
    cells = config(
        "k-lst:num_heads=2",
        "siva:targets=query+value:epochs=2",
        seeds=2,
        common={"max_steps": 3, "warmup_steps": 1, "data": "some.csv"},
    ).cells()
    assert [cell.name for cell in cells] == [
        "k-lst-num_heads=2-seed0",
        "k-lst-num_heads=2-seed1",
        "siva-targets=query+value-epochs=2-seed0",
        "siva-targets=query+value-epochs=2-seed1",
    ]
    ladder, siva = (TrainConfig.from_values(cells[index].values) for index in (0, 3))
    assert ladder.settings == {"warmup_steps": 1, "num_heads": 2}
    assert (ladder.method, ladder.seed, ladder.max_steps, ladder.data) == ("k-lst", 0, 3, "some.csv")
    assert ladder.output == str(Path("out") / "cells" / "k-lst-num_heads=2-seed0")
    assert (siva.targets, siva.seed, siva.max_steps, siva.epochs) == ("query,value", 1, None, 2)


def test_prompts_are_combined_with_variants_that_have_none() -> None:
    prompted = config(
        "zero-shot",
        "mezo",
        "head:prompt=MR:prompt_head=classifier",
        prompts=["none", "sst2", "{text} <mask>:label_words=bad+good"],
        seeds=2,
    )
    cells = prompted.cells()
    assert list(dict.fromkeys(cell.variant for cell in cells)) == [
        "zero-shot:prompt=sst2",
        "zero-shot:prompt={text} <mask>:label_words=bad+good",
        "mezo",
        "mezo:prompt=sst2",
        "mezo:prompt={text} <mask>:label_words=bad+good",
        "head:prompt=MR:prompt_head=classifier",
    ]
    assert [cell.name for cell in cells if cell.method == "zero-shot"] == [
        "zero-shot-prompt=sst2",
        "zero-shot-prompt=-text-mask-label_words=bad+good",
    ], "no seeds where nothing is drawn"
    assert cells[1].values["label_words"] == "bad,good"


def test_a_chain_and_its_start_are_combined_with_one_prompt() -> None:
    def starts(*methods: str, prompts: list[str]) -> dict[str, str | None]:
        return {cell.name: cell.after for cell in config(*methods, prompts=prompts).cells()}

    chained = "lst-prompt=sst2-init_from=mezo-prompt=sst2-seed0"
    found = starts("mezo", "lst:init_from=mezo", prompts=["none", "sst2"])
    assert found["lst-init_from=mezo-seed0"] == "mezo-seed0"
    assert found[chained] == "mezo-prompt=sst2-seed0"
    assert starts("mezo", "lst:init_from=mezo:prompt=sst2", prompts=["sst2"])[chained] == "mezo-prompt=sst2-seed0"
    own = starts(
        "mezo:prompt=MR", "lst:init_from=mezo:prompt=MR", "head:prompt=MR:init_from=mezo:prompt=MR", prompts=["sst2"]
    )
    assert own["lst-prompt=sst2-init_from=mezo-prompt=MR-seed0"] == "mezo-prompt=MR-seed0"
    assert own["head-prompt=MR-init_from=mezo-prompt=MR-seed0"] == "mezo-prompt=MR-seed0"
    with pytest.raises(FastpeftError, match=r"'mezo', but the comparison has mezo:prompt=sst2, .*Name one of them"):
        config("mezo", "lst:prompt=MR:init_from=mezo", prompts=["sst2"])


def test_a_chain_comes_after_its_start(tmp_path: Path) -> None:
    chained = config(
        "head:init_from=lst:init_from=mezo",
        "lst:init_from=mezo",
        "mezo",
        "siva",
        output=str(tmp_path / "out"),
        seeds=2,
    )
    made = Plan.make(chained, "command")
    assert [cell.name for cell in made.wanted[:3]] == [
        "mezo-seed0",
        "lst-init_from=mezo-seed0",
        "head-init_from=lst-init_from=mezo-seed0",
    ]
    assert [cell.variant for cell in made.cells] == [cell.variant for cell in chained.cells()], "the report's order"
    by_name = {cell.name: cell for cell in made.cells}
    assert by_name["lst-init_from=mezo-seed1"].after == "mezo-seed1"
    follower, start = by_name["lst-init_from=mezo-seed1"], by_name["mezo-seed1"]
    assert Path(follower.values["init_from"]) == Path(start.values["output"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "no method to compare. Name some of siva"),
        ({"methods": "siva"}, "methods are 'siva'; they must be a list"),
        ({"methods": ["siva", ""]}, "that are not empty"),
        ({"output": ""}, "output is ''"),
        ({"seeds": 0}, "seeds is 0; it must be a whole number from 1"),
        ({"seeds": True}, "seeds is True"),
        ({"methods": ["siva", "adapterz"]}, "unknown method 'adapterz'; allowed are siva"),
        ({"methods": ["siva:rank"]}, "unknown method 'siva:rank'"),
        ({"methods": ["siva:rank="]}, "rank has no value"),
        ({"methods": ['siva:targets="query":rank=2', 'siva:targets=".*\\.key"']}, "which is no text of JSON. Close"),
        ({"methods": ['head:prompt="{text} <mask>:rank=2']}, "which is no text of JSON. Close the quotes"),
        ({"methods": ["siva:rank=2:rank=3"]}, "rank has two values"),
        ({"methods": ["siva:rank=0"]}, "the variant 'siva:rank=0' cannot be used: rank is 0"),
        ({"methods": ["siva:ranc=2"]}, "unknown setting 'ranc'"),
        (
            {"methods": ["siva", "k-lst:window=4"]},
            "the variant 'k-lst:window=4' cannot be used: window_size=4; a window",
        ),
        ({"methods": ["mezo:over=lst:num_heads=2"]}, "a gate mixes one feature"),
        ({"methods": ["siva", "lora:data=other.csv"]}, "it has data, but all cells share their rows"),
        ({"methods": ["siva:split_seed=3"]}, "it has split_seed, but all cells share"),
        ({"methods": ["zero-shot:prompt=sst2:label_column=stars"]}, "it has label_column, but all cells share"),
        ({"methods": ["lora:window=5"]}, "'lora' takes no window"),
        ({"methods": ["siva:seed=2"]}, "seed cannot be given; the number of seeds decides it"),
        ({"methods": ["siva"], "common": {"output": "x"}}, "output cannot be given"),
        ({"methods": ["siva"], "common": {"epochs": -1}}, "epochs is -1"),
        ({"methods": ["siva", "lora", "siva"]}, "the variants 'siva' and 'siva' are one"),
        (
            {"methods": ["head:prompt=sst2:label_words=a+b", "head:prompt=sst2:label_words=A+b"]},
            "would share the folder",
        ),
        ({"methods": ["head:prompt={text} <mask>" + "x" * 200]}, "would name a folder of"),
        ({"methods": ["zero-shot"]}, "zero-shot needs a prompt"),
        ({"methods": ["zero-shot"], "prompts": ["none"]}, "zero-shot needs a prompt"),
        ({"methods": ["zero-shot:prompt=sst2:calibrate=maybe"]}, "calibrate is 'maybe'; it must be true or false"),
        ({"methods": ["zero-shot:prompt=sst2:rank=3"]}, "zero-shot takes no rank"),
        ({"methods": ["zero-shot:prompt=sst2:init_from=siva", "siva"]}, "zero-shot neither starts from a run"),
        ({"methods": ["zero-shot:prompt=sst2"], "common": {"split_seed": 1}}, "zero-shot takes no split_seed"),
        ({"methods": ["siva"], "prompts": ["sst2"], "common": {"prompt": "MR"}}, "Give one of the two"),
        ({"methods": ["siva"], "prompts": ["sst99"]}, "no prompt is named 'sst99'"),
        ({"methods": ["lst:init_from=mezo", "siva"]}, "init_from names 'mezo', but the comparison has"),
        ({"methods": ["lst:init_from=zero-shot:prompt=MR", "zero-shot:prompt=MR"]}, "nor leaves one"),
        ({"methods": ["lst:init_from=lst"]}, "init_from names 'lst'"),
        ({"methods": ["lst:init_from=mezo", "mezo"], "common": {"init_from": "x"}}, "for all cells and by a variant"),
    ],
)
def test_what_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError) as raised:
        CompareConfig(**{"output": "out", "methods": ["siva"], **changes})
    assert message in str(raised.value)


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FastpeftError, match="no folder of a comparison and not empty"):
        Plan.make(config("siva", output=str(tmp_path)), "command")
    (tmp_path / "comparison.json").write_text('{"cells": [{"name": "siva-seed0"}], "commands": []}')
    with pytest.raises(FastpeftError, match=r"comparison\.json is not of a comparison"):
        Plan.make(config("siva", output=str(tmp_path)), "command")
    file = tmp_path / "notes.txt"
    with pytest.raises(FastpeftError, match="left alone"):
        Plan.make(config("siva", output=str(file)), "command")


def test_another_plan_adds_cells_and_changes_none(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    first = Plan.make(config("siva", "head", output=output), "first")
    assert not Path(output).exists(), "a plan writes nothing"
    first.save()
    run = first.cells[0].folder.path
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"fastpeft_version": "0", **first.cells[0].values}))

    added = Plan.make(config("lora", "siva", output=output), "second")
    assert [cell.name for cell in added.cells] == ["siva-seed0", "head-seed0", "lora-seed0"]
    assert [cell.name for cell in added.wanted] == ["lora-seed0", "siva-seed0"]
    assert added.commands == ["first", "second"]

    with pytest.raises(FastpeftError, match=r"the cell 'siva-seed0' cannot be run .* max_steps None -> 5"):
        Plan.make(config("siva", output=output, common={"max_steps": 5}), "third")
    for other in ({"data": "other.csv"}, {"split_seed": 1}):
        with pytest.raises(FastpeftError, match=r"'siva-seed0' has \w+ .*, but 'bitfit-seed0' has .* another output"):
            Plan.make(config("bitfit", output=output, common=other), "third")
    changed = Plan.make(config("head", output=output, common={"max_steps": 5}), "fourth")
    assert [cell.values["max_steps"] for cell in changed.cells] == [None, 5], "what has not started may change"
