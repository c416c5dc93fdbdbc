"""What is predicted of cards: counted in machine code, whole, and compared with what is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import predictions
from bench.harness import read_rows

CODE = """
.L_x_4:
        /*0000*/                   IMAD R1, R2, R3, R4 ;
.L_x_3:
        /*0010*/                   LDSM R4, [R2] ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R5, R6 ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R5, R6 ;
        /*0040*/              @!P0 BRA `(.L_x_3) ;
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4] ;
        /*0060*/                   STG.E [R2], R4 ;
        /*0070*/                   STG.E [R2], R4 ;
        /*0080*/               @P1 BRA `(.L_x_4) ;
        /*0090*/                   BRA `(.L_x_9) ;
"""


def test_the_main_loop_is_the_one_of_most_matrix_instructions() -> None:
    assert predictions.loop_instructions(CODE) == 4


def test_every_way_of_24_shapes_is_predicted_for_each_card() -> None:
    rows = read_rows(predictions.FILE)
    for arch in predictions.CARDS:
        of_card = [row for row in rows if row["arch"] == arch]
        ways = {"fused", "split", "split-k", "aten"} | ({"fused tma", "split tma"} if arch == "sm_90" else set())
        assert len(of_card) == 24 * len(ways)
        assert {row["way"] for row in of_card} == ways
        assert all(float(row["microseconds"]) > 0 for row in of_card)


@pytest.mark.parametrize(("power", "expected"), [(1, 1), (-1, -1)])
def test_predicted_and_measured_times_are_compared(tmp_path: Path, power: int, expected: int) -> None:
    measured: dict[str, dict[str, float]] = {}
    for row in read_rows(predictions.FILE):
        shape = f"{row['out_features']}x{row['in_features']} rank 16 rows {row['rows']} on {row['arch']}"
        measured.setdefault(f"siva_linear bfloat16 {shape}", {})[row["way"]] = float(row["microseconds"]) ** power
    file = tmp_path / "sm_80.json"
    file.write_text(json.dumps(measured))
    found = {what: correlation for what, correlation, _ in predictions.against(file)}
    assert found == {"all": pytest.approx(expected), "ways": pytest.approx(expected)}
    file.write_text("{}")
    assert not list(predictions.against(file))
