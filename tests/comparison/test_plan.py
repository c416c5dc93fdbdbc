"""Variants as written, the cells they stand for, and what is refused before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compared
import pytest

from fastpeft import CompareConfig, FastpeftError
from fastpeft.comparison import suites
from fastpeft.comparison.plan import Plan
from fastpeft.comparison.variants import parse_variant, split_items
from fastpeft.data.problems import CLASSIFICATION
from fastpeft.training.config import TrainConfig
from fastpeft.training.lineage import check_output, check_start
from fastpeft.training.run_folder import RunFolder


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


@pytest.mark.parametrize("text", ["siva,,", ",siva", "siva, ,lora", "siva,"])
def test_a_comma_with_nothing_beside_it_is_told(text: str) -> None:
    with pytest.raises(FastpeftError, match=f"nothing before, between or after the commas of '{text}'"):
        split_items(text)
    with pytest.raises(FastpeftError, match="a list is empty"):
        split_items(" ")


def test_cells_of_variants_and_seeds() -> None:
    cells = config(
        "k-lst:layer_drop=0.1",
        "siva:targets=query+value:epochs=2",
        seeds=2,
        common={"max_steps": 3, "warmup_steps": 1, "data": "some.csv"},
    ).cells()
    assert [cell.name for cell in cells] == [
        "k-lst-layer_drop=0.1-seed0",
        "k-lst-layer_drop=0.1-seed1",
        "siva-targets=query+value-epochs=2-seed0",
        "siva-targets=query+value-epochs=2-seed1",
    ]
    ladder, siva = (TrainConfig.from_values(cells[index].values) for index in (0, 3))
    assert ladder.settings == {"warmup_steps": 1, "layer_drop": 0.1}
    assert (ladder.method, ladder.seed, ladder.max_steps, ladder.data) == ("k-lst", 0, 3, "some.csv")
    assert ladder.output == str(Path("out") / "cells" / "k-lst-layer_drop=0.1-seed0")
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
        return {cell.name: next(iter(cell.after), None) for cell in config(*methods, prompts=prompts).cells()}

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
    with pytest.raises(
        FastpeftError, match=r"no variant of the comparison. Add it, .*; or name one of mezo:prompt=sst2\.$"
    ):
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
    assert by_name["lst-init_from=mezo-seed1"].after == ("mezo-seed1",)
    follower, start = by_name["lst-init_from=mezo-seed1"], by_name["mezo-seed1"]
    assert Path(follower.values["init_from"]) == Path(start.values["output"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "no method to compare. Give --methods with one or more of siva, k-lst"),
        ({"methods": []}, "or --suite with one of table1, table2, figure5."),
        ({"methods": ["siva:tagets=query"]}, "Did you mean targets? A variant takes"),
        ({"methods": ["siva:learning_rat=1"]}, "Did you mean learning_rate? A variant takes"),
        ({"methods": "siva"}, "methods are 'siva'; they must be a list"),
        ({"methods": ["siva", ""]}, "that are not empty"),
        ({"output": ""}, "output is ''"),
        ({"seeds": 0}, "seeds is 0; it must be a whole number from 1"),
        ({"seeds": True}, "seeds is True"),
        ({"methods": ["siva", "adapterz"]}, "unknown method 'adapterz'; allowed are siva"),
        ({"methods": ["siva", "zero_shot"]}, "Did you mean zero-shot?"),
        ({"methods": ["siva:rank"]}, "unknown method 'siva:rank'"),
        ({"methods": ["siva:rank="]}, "rank has no value"),
        ({"methods": ["siva:"]}, "nothing follows the colon of 'siva:'. Write a key and its value after it"),
        ({"methods": ["siva::rank=8"]}, "nothing follows the colon of 'siva:'"),
        ({"methods": ['siva:targets="query":rank=2', 'siva:targets=".*\\.key"']}, "which is no text of JSON. Close"),
        ({"methods": ['head:prompt="{text} <mask>:rank=2']}, "which is no text of JSON. Close the quotes"),
        ({"methods": ["siva:rank=2:rank=3"]}, "rank has two values"),
        ({"methods": ["siva:rank=0"]}, "the variant 'siva:rank=0' cannot be used: rank is 0"),
        ({"methods": ["siva:ranc=2"]}, "unknown setting 'ranc'"),
        (
            {"methods": ["siva", "k-lst:window=4"]},
            "the variant 'k-lst:window=4' cannot be used: window_size=4; a window",
        ),
        ({"methods": ["mezo:over=lst:residual=true"]}, "a gate mixes one feature"),
        ({"methods": ["siva", "lora:data=other.csv"]}, "it has data, but all cells share their rows"),
        ({"methods": ["siva:split_seed=3"]}, "it has split_seed, but all cells share"),
        ({"methods": ["zero-shot:prompt=sst2:label_column=stars"]}, "it has label_column, but all cells share"),
        ({"methods": ["lora:window=5"]}, "'lora' takes no window"),
        ({"methods": ["siva:seed=2"]}, "seed cannot be given; the number of seeds decides it"),
        ({"methods": ["siva"], "common": {"output": "x"}}, "output cannot be given"),
        ({"methods": ["siva"], "common": {"epochs": -1}}, "epochs is -1"),
        ({"methods": ["siva", "lora", "siva"]}, "the variants 'siva' and 'siva' are the same"),
        (
            {"methods": ["head:prompt=sst2:label_words=a+b", "head:prompt=sst2:label_words=A+b"]},
            "or would write to the same folder",
        ),
        ({"methods": ["head:prompt={text} <mask>" + "x" * 200]}, "would name a folder of"),
        ({"methods": ["head:prompt={text} " + "я" * 150 + " <mask>"]}, "would name a folder of 323 bytes"),
        ({"methods": ["zero-shot"]}, "zero-shot needs a prompt"),
        ({"methods": ["zero-shot"], "prompts": ["none"]}, "zero-shot needs a prompt"),
        ({"methods": ["zero-shot:prompt=sst2:calibrate=maybe"]}, "calibrate is 'maybe'; it must be true or false"),
        ({"methods": ["zero-shot:prompt=sst2:rank=3"]}, "zero-shot takes no rank"),
        (
            {"methods": ["zero-shot:prompt=sst2:init_from=siva", "siva"]},
            "zero-shot trains nothing, so it cannot start from a run",
        ),
        ({"methods": ["zero-shot:prompt=sst2"], "common": {"split_seed": 1}}, "zero-shot takes no split_seed"),
        ({"methods": ["siva"], "prompts": ["sst2"], "common": {"prompt": "MR"}}, "Give one of the two"),
        ({"methods": ["siva"], "prompts": ["sst99"]}, "no prompt is named 'sst99'"),
        (
            {"methods": ["lst:init_from=mezo", "siva", "zero-shot:prompt=sst2"]},
            "init_from names 'mezo', which is no variant of the comparison. Add it, as --methods "
            "mezo,lst:init_from=mezo; or name one of siva.",
        ),
        ({"methods": ["lst:init_from=mezo"]}, "Add it, as --methods mezo,lst:init_from=mezo."),
        ({"methods": ["lst:init_from=zero-shot:prompt=MR", "zero-shot:prompt=MR"]}, "and no run can start from it"),
        ({"methods": ["lst:init_from=lst"]}, "init_from names 'lst'"),
        ({"methods": ["lst:init_from=mezo", "mezo"], "common": {"init_from": "x"}}, "for all cells and by a variant"),
        (
            {"methods": ["lst:init_from=mezo:learning_rate=1e-6", "mezo:learning_rate=1e-6"], "protocol": "full"},
            "also from those on which learning rates for lst are compared. Give lst a learning_rate, or "
            "'mezo:learning_rate=1e-6' none.",
        ),
        ({"methods": iter(["siva"])}, "they must be a list of texts that are not empty"),
        ({"prompts": None}, "prompts are None; they must be a list"),
        ({"common": None}, "common is None; it must be a dictionary"),
        ({"protocol": "fast"}, "protocol is 'fast'; it must be one of quick, full"),
        ({"suite": "table9"}, "unknown suite 'table9'; allowed are table1, table2, figure5"),
        ({"suite": "table1", "prompts": ["none", "sst2"]}, "table1 has rows with a prompt and rows without"),
        ({"suite": "table1", "methods": ["full"]}, "the variants 'full' and 'full' are the same"),
    ],
)
def test_what_cannot_be_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FastpeftError) as raised:
        CompareConfig(**{"output": "out", "methods": ["siva"], **changes})
    assert message in str(raised.value)


def test_a_folder_may_be_a_path_and_lists_are_its_own() -> None:
    methods = ["siva"]
    config = CompareConfig(output=Path("out"), methods=methods)  # type: ignore[arg-type]
    methods.append("nothing")
    assert config == CompareConfig(output="out", methods=["siva"])


@pytest.mark.parametrize(("letter", "count"), [("x", 141), ("я", 70), ("字", 47)])
def test_the_longest_name_leaves_room_for_the_files_of_a_cell(letter: str, count: int) -> None:
    """File systems take 255 bytes: of a cell's name, what stands around it, and the ending while it is written."""
    longest = f"head:prompt={{text}} {letter * count}<mask>:label_words=a+b"
    names = [f".{cell.clock.name}.{'0' * 8}.part" for cell in config(longest, protocol="full", seeds=100).cells()]
    assert 225 < max(len(name.encode()) for name in names) <= 255
    with pytest.raises(FastpeftError, match=r"would name a folder of 20[1-3] bytes"):
        config(longest.replace("<mask>", f"{letter}<mask>"), protocol="full")


def test_figure5_has_one_rate_whatever_the_protocol() -> None:
    cells = CompareConfig(output="out", suite="figure5", protocol="full").cells()
    assert [cell.seed for cell in cells] == [0, 1, 2] * 4
    assert {cell.values["learning_rate"] for cell in cells} == {1e-4}
    assert not any(cell.search for cell in cells)


@pytest.mark.parametrize(("suite", "rows"), [("table1", 11), ("table2", 18), ("figure5", 4)])
def test_suites_are_the_papers_rows(suite: str, rows: int) -> None:
    cells = CompareConfig(output="out", suite=suite, methods=["bitfit"], protocol="quick").cells()
    assert len({cell.variant for cell in cells}) == len(cells) == rows + 1
    assert cells[-1].variant == "bitfit"
    assert all(suites.paper_accuracy(cell.variant) != "-" for cell in cells[:-1])
    assert suites.paper_accuracy("bitfit") == "-"
    assert all(cell.values["epochs"] == 1 for cell in cells if cell.method != "mezo")


def test_a_suite_takes_another_prompt_and_other_values() -> None:
    prompt = "{text} So <mask>!:label_words=bad+good"
    suite = CompareConfig(output="out", suite="table2", prompts=[prompt], common={"max_steps": 5})
    prompted = [cell for cell in suite.cells() if cell.values["prompt"]]
    assert len(prompted) == 7
    assert {(cell.values["prompt"], cell.values["label_words"]) for cell in prompted} == {
        ("{text} So <mask>!", "bad,good")
    }
    chained = next(cell for cell in prompted if cell.after and cell.values["window"] == 9)
    assert chained.after == (next(cell.name for cell in prompted if cell.method == "mezo"),)
    assert chained.values["prompt_head"] == "classifier"
    figure = CompareConfig(output="out", suite="figure5", common={"max_steps": 5, "learning_rate": 0.5}).cells()
    assert {(cell.values["learning_rate"], cell.values["max_steps"], cell.values["epochs"]) for cell in figure} == {
        (0.5, 5, None)
    }


def test_a_suite_without_its_prompts() -> None:
    cells = CompareConfig(output="out", suite="table2", prompts=["none"]).cells()
    assert len(cells) == 8
    assert not any(cell.values["prompt"] for cell in cells)


def test_a_suite_finds_its_prompts() -> None:
    """Rows with a prompt and a classification head take the template alone."""
    cells = CompareConfig(output="out", suite="table2", prompts=["auto"]).cells()
    prompted = [cell for cell in cells if cell.values["prompt"]]
    assert len(prompted) == 7
    assert {cell.values["prompt_head"] for cell in prompted} == {None, "classifier"}
    assert all(cell.config.awaits_prompt for cell in prompted)


def test_quick_is_one_epoch_but_for_mezo() -> None:
    cells = config("siva", "mezo", "lst:epochs=3", "head:max_steps=7", protocol="quick").cells()
    assert [(cell.values["epochs"], cell.values["max_steps"]) for cell in cells] == [
        (1, None),
        (None, None),
        (3, None),
        (None, 7),
    ]


@pytest.mark.parametrize(("before", "now"), [("quick", "full"), ("quick", None), (None, "quick"), (None, "full")])
def test_another_protocol_is_refused(tmp_path: Path, before: str | None, now: str | None) -> None:
    output = str(tmp_path / "out")
    plan = Plan.make(config("siva", output=output, protocol=before), "command")
    plan.save()
    finish(plan.results[0], accuracy=0.5)
    with pytest.raises(FastpeftError, match="cell 'siva-seed0' cannot be run in"):
        Plan.make(config("siva", output=output, protocol=now), "command")
    with pytest.raises(FastpeftError, match="rank None -> 2" if now != "full" else "not searched, and is now to be"):
        Plan.make(config("siva", output=output, protocol=now, common={"rank": 2}), "command")


def test_a_rate_that_was_given_is_no_other_protocol(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    plan = Plan.make(config("siva", output=output, common={"learning_rate": 1.0}), "command")
    plan.save()
    finish(plan.results[0], accuracy=0.5)
    with pytest.raises(FastpeftError, match=r"learning_rate 1\.0 -> None"):
        Plan.make(config("siva", output=output), "command")
    with pytest.raises(FastpeftError, match="its learning rate was not searched, and is now to be"):
        Plan.make(config("siva", output=output, protocol="full"), "command")


def test_full_tries_as_many_rates_for_every_method(tmp_path: Path) -> None:
    full = config(
        "siva", "lst:init_from=mezo", "mezo", "lora:learning_rate=1e-3", output=str(tmp_path), protocol="full"
    )
    plan = Plan.make(full, "command")
    tried = {variant: [cell for cell in plan.searches if cell.variant == variant] for variant in full.methods}
    assert {variant: len(cells) for variant, cells in tried.items()} == {
        "siva": 3,
        "lst:init_from=mezo": 3,
        "mezo": 3,
        "lora:learning_rate=1e-3": 0,
    }
    assert [cell.values["learning_rate"] for cell in tried["siva"]] == [0.001, 0.000333, 0.003]
    assert {cell.values["data"] for cell in plan.searches} == {str(tmp_path.resolve() / "slice")}
    assert {cell.values["data"] for cell in plan.results} == {"demo"}
    assert [cell.seed for cell in plan.results if cell.method == "siva"] == [0, 1, 2]
    order = [cell.name for cell in plan.wanted]
    for cell in plan.wanted:
        assert all(order.index(name) < order.index(cell.name) for name in cell.needs)
    follower = tried["lst:init_from=mezo"][0]
    assert set(follower.after) == {cell.name for cell in tried["mezo"]}, "of what saw no dev row of the slice"
    assert tried["mezo"][0].name == "search-mezo-learning_rate=6e-06"


def finish(cell: Any, **metrics: Any) -> None:
    """Let a cell's folder hold a finished run."""
    cell.folder.path.mkdir(parents=True)
    (cell.folder.path / "run.json").write_text(json.dumps({"fastpeft_version": "0", **cell.values}))
    (cell.folder.path / "metrics.json").write_text(json.dumps({"problem_type": CLASSIFICATION.name, **metrics}))


@pytest.mark.parametrize(("lost", "gained", "rate"), [(0, 6, 1e-3), (1, 9, 3e-3)])
def test_a_rate_takes_the_place_of_the_recipes_only_by_a_paired_test(
    tmp_path: Path, lost: int, gained: int, rate: float
) -> None:
    """With predictions at hand: p is 0.031 and 0.021 by McNemar's exact test, twice that for two rates, not thrice."""
    plan = Plan.make(config("siva", output=str(tmp_path / "out"), protocol="full", seeds=1), "command")
    plan.save()
    better = [int(lost <= row < 100 + gained) for row in range(compared.ROWS)]
    for cell, right in zip(plan.searches, (100, 90, better)):
        compared.finish(cell, right, memory=1.0, speed=1.0)
    assert plan.fill_in(plan.results[0]).values["learning_rate"] == rate


def test_the_best_rate_is_taken_and_kept(tmp_path: Path) -> None:
    full = config("siva", output=str(tmp_path / "out"), protocol="full", seeds=1)
    plan = Plan.make(full, "command")
    plan.save()
    result = plan.results[0]
    for cell, accuracy in zip(plan.searches, (0.7, 0.8, 0.8)):
        assert plan.fill_in(result).values["learning_rate"] is None, "not before all rates are tried"
        finish(cell, accuracy=accuracy)
    settled = plan.fill_in(result)
    assert settled.values["learning_rate"] == 0.000333, "of equal ones the first"
    assert plan.results == [settled]
    assert Plan.make(full, "command").results == [settled]
    finish(settled, accuracy=0.9)
    metrics = plan.searches[2].folder.metrics_file
    metrics.write_text(json.dumps({"accuracy": 0.99}))
    assert Plan.make(full, "command").results[0].values["learning_rate"] == 0.000333, "what has started keeps its own"


def test_a_folder_that_moved_goes_on(tmp_path: Path) -> None:
    """What tries rates has its slice in the folder, and what starts from another run has that there."""
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    methods = ("head:init_from=lst:init_from=mezo", "lst:init_from=mezo", "mezo")
    plan = Plan.make(config(*methods, output=str(old), protocol="full", seeds=1), "command")
    plan.save()
    for cell in list(plan.wanted):
        settled = plan.fill_in(cell)
        finish(settled, accuracy=0.5)
        if start := settled.values["init_from"]:  # as a run writes it
            file = settled.folder.config_file
            weights = {"init_from": str(Path(start).resolve()), "init_from_weights": RunFolder(start).fingerprint()}
            file.write_text(json.dumps({**json.loads(file.read_text()), **weights}))
    new.parent.mkdir()
    old.rename(new)
    moved = Plan.make(config(*methods, output=str(new), protocol="full", seeds=1), "command")
    written = {cell.name: cell.folder.config_file.read_text() for cell in moved.cells}
    assert any(str(old) in text for text in written.values()), "a plan writes nothing"
    assert [cell.state for cell in moved.wanted] == ["finished"] * len(plan.wanted)
    moved.save()
    for file in [new / "comparison.json", *(cell.folder.config_file for cell in moved.cells)]:
        assert str(old / "slice") not in file.read_text()
        assert f'"init_from": "{old}' not in file.read_text()
    for cell in moved.cells:
        check_start(cell.folder)
    assert not old.exists()
    (new / "cells" / "lst-init_from=mezo-seed0" / "metrics.json").unlink()
    again = Plan.make(config(*methods[1:], output=str(new), protocol="full", seeds=1), "command")
    cell = again.fill_in(again.results[1])
    assert (cell.name, cell.state) == ("lst-init_from=mezo-seed0", "waiting")
    assert cell.values["init_from"] == str(new / "cells" / "mezo-seed0")
    check_output(cell.folder, cell.config.values(), resume=True, overwrite=False)  # as its process does


def test_a_rate_that_failed_is_not_taken(tmp_path: Path) -> None:
    plan = Plan.make(config("siva", output=str(tmp_path / "out"), protocol="full", seeds=1), "command")
    plan.save()
    for cell in plan.searches:
        cell.log.write_text("Error: the loss is nan\n")
    names = " and ".join(cell.name for cell in plan.searches)
    with pytest.raises(FastpeftError, match=f"{re.escape(names)}, whose learning rate it takes, have failed"):
        plan.fill_in(plan.results[0])
    finish(plan.searches[2], accuracy=0.6)
    assert plan.fill_in(plan.results[0]).values["learning_rate"] == 0.003


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FastpeftError, match="no folder of a comparison and not empty"):
        Plan.make(config("siva", output=str(tmp_path)), "command")
    (tmp_path / "comparison.json").write_text('{"cells": [{"name": "siva-seed0"}], "commands": []}')
    with pytest.raises(FastpeftError, match=r"comparison\.json is not of a comparison"):
        Plan.make(config("siva", output=str(tmp_path)), "command")
    file = tmp_path / "notes.txt"
    with pytest.raises(FastpeftError, match=r"notes\.txt' is a file\. Give the name of a new folder"):
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


def _precisions(plan: Plan) -> dict[str, bool | None]:
    return {cell.name: cell.values["bf16"] for cell in plan.cells}


def _machine(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("fastpeft.training.setup.prefers_bfloat16", lambda: has)
    monkeypatch.setattr("fastpeft.training.setup.best_device", lambda: "cpu")


@pytest.mark.parametrize("has", [True, False])
def test_cells_compute_in_the_same_whatever_machine_adds_or_runs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has: bool
) -> None:
    output = str(tmp_path / "out")
    _machine(monkeypatch, has)
    made = Plan.make(config("siva", "mezo", "lora:bf16=true", output=output), "first")
    expected = {"siva-seed0": has, "mezo-seed0": False, "lora-bf16=true-seed0": True}
    assert _precisions(made) == expected
    made.save()
    _machine(monkeypatch, not has)
    added = Plan.make(config("siva", "head", "mezo", "mezo:rank=2:over=lora", output=output), "second")
    assert _precisions(added) == expected | {"head-seed0": has, "mezo-rank=2-over=lora-seed0": False}


def test_cells_compute_in_what_is_given_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path / "out")
    _machine(monkeypatch, True)
    made = Plan.make(config("siva", "mezo", output=output, common={"bf16": False}), "first")
    assert _precisions(made) == {"siva-seed0": False, "mezo-seed0": False}
    made.save()
    Plan.make(config("lora", output=output, common={"bf16": True}), "second").save()
    (again,) = Plan.make(config("lora", output=output), "third").wanted
    assert again.values["bf16"] is True, "its own, not that of another cell"


def test_cells_with_weights_in_bfloat16_compute_in_it_beside_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, False)
    output = str(tmp_path / "out")
    Plan.make(config("siva", output=output), "first").save()
    added = Plan.make(config("siva:dtype=bfloat16", "lora", output=output), "second")
    assert _precisions(added) == {"siva-seed0": False, "siva-dtype=bfloat16-seed0": True, "lora-seed0": False}
