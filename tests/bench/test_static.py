"""`bench/data/static.csv` describes the kernels as they are, and none of them spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
import triton

from bench import static
from bench.harness import read_rows

MULTIPLYING = (
    *("siva_linear_fwd", "siva_linear_group_fwd", "siva_linear_group_bwd_dx"),
    *("siva_linear_mixed_fwd", "siva_linear_mixed_bwd_dx", "siva_linear_mixed_bwd_partials"),
    *("siva_linear_bwd_partials", "window_attention_fwd"),
    *("window_attention_bwd_bases", "window_attention_bwd_queries", "window_attention_bwd_keys"),
)
REGENERATE = "run `python -m bench.static` and commit bench/data/static.csv"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_rows(static.FILE)


def test_every_shipped_tile_has_its_row(rows):
    recorded = [tuple(row[column] for column in static.KEY) for row in rows]
    shipped = [tuple(variant.key()[column] for column in static.KEY) for variant in static.variants()]
    assert recorded == shipped, REGENERATE


def test_rows_are_of_the_present_source(rows):
    for kernel in static.KERNELS:
        hashes = {row["source"] for row in rows if row["kernel"] == kernel}
        assert hashes == {static.source_hash(kernel)}, f"{kernel} has changed: {REGENERATE}"


def test_nothing_spills(rows):
    assert [row for row in rows if row["stack_bytes"] != "0"] == []


def test_shared_memory_fits(rows):
    """What one program can have, in KiB, by the vendors' manuals."""
    most = {
        "sm_75": 64,
        "sm_80": 163,
        "sm_86": 99,
        "sm_89": 99,
        "sm_90": 227,
        "sm_100": 227,
        "sm_120": 99,
        "gfx942": 64,
    }
    assert [row for row in rows if int(row["shared_bytes"]) > 1024 * most[row["arch"]]] == []
    kernels = {row["kernel"] for row in rows} - {row["kernel"] for row in rows if row["arch"] == "sm_86"}
    least = min(most[arch] for arch in static.TARGETS.keys() - set(static.SHARED_ARCHS))
    as_sm_80 = [row for row in rows if row["kernel"] in kernels and row["arch"] == "sm_80"]
    assert [row for row in as_sm_80 if int(row["shared_bytes"]) > 1024 * least] == []


def test_half_precision_runs_on_matrix_units(rows):
    for row in rows:
        if row["kernel"] in MULTIPLYING and row["dtype"] in ("bf16", "fp16"):
            assert sum(int(row[name]) for name in static.MATRIX_INSTRUCTIONS) > 0, row


def test_the_cuda_module_is_described_as_it_is():
    rows = read_rows(static.CUDA_FILE)
    assert {row["source"] for row in rows} == {static.cuda_source_hash()}, (
        f"csrc has changed: build fastpeft._C_cuda, {REGENERATE.replace('static.csv', 'static_cuda.csv')}"
    )
    kinds = {(row["dtype"], row["tile"]) for row in rows}
    assert len(kinds) == 8
    assert len(rows) == len(kinds) * len({row["arch"] for row in rows})


def test_the_cuda_module_neither_spills_nor_fuses():
    for row in read_rows(static.CUDA_FILE):
        assert row["stack_bytes"] == "0", row
        assert row["fused"] == "0", row
        assert int(row["wide_loads"]) > 0, row
        assert int(row["wide_stores"]) > 0, row


def run_apart(code):
    """What it prints in another process: this session's kernels may be interpreted ones."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = static.DATA.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


MOST_PER_ELEMENT = 35  # instructions that an H100 executes while its memory moves an element of 16 bits


def test_the_gaussian_pass_of_the_cuda_module_is_short():
    """sm_75 has no instruction that rounds to bfloat16."""
    rows = [row for row in read_rows(static.CUDA_FILE) if row["tile"] == "gaussian" and row["dtype"] != "float64"]
    assert rows
    for row in rows:
        assert float(row["per_element"]) <= (45 if row["arch"] == "sm_75" else MOST_PER_ELEMENT), row


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "i16", "fp16"])
def test_the_gaussian_pass_in_triton_is_short(dtype):
    code = f"from bench import static; print(static.gaussian_per_element('sm_90', {dtype!r}))"
    assert float(run_apart(code)) <= MOST_PER_ELEMENT


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_window_attention_multiplies_features_as_they_are_loaded(arch, width):
    """By asynchronous copies and without dropout; a tile that passes through registers would be stored."""
    assert int(run_apart(f"from bench import static; print(static.stores_in_loop({arch!r}, {width}))")) == 0


def test_named_kernels_alone_are_compiled_anew(rows, monkeypatch):
    monkeypatch.setattr(static, "compile_row", lambda variant: variant.key())
    monkeypatch.setattr(static, "write_rows", lambda file, found: written.append(found))
    monkeypatch.setattr(static.sys, "argv", ["static", "mezo_perturb"])
    monkeypatch.setattr(static, "ROOT", static.ROOT / "nowhere")  # has no CUDA module
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    written = []
    static.main()
    new = [{column: row[column] for column in static.KEY} for row in rows]
    assert written == [[one if one["kernel"] == "mezo_perturb" else row for row, one in zip(rows, new, strict=True)]]
    monkeypatch.setattr(static.sys, "argv", ["static", "mezo"])
    with pytest.raises(SystemExit, match="knows no kernel mezo; name some of siva_linear_fwd"):
        static.main()


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="unset it"):
        static.main()


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_recompiling_gives_the_row(rows, arch):
    index, row = next((i, row) for i, row in enumerate(rows) if row["arch"] == arch)
    if row["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {row['triton']}, this is {triton.__version__}")
    code = f"print(json.dumps(static.compile_row(list(static.variants())[{index}])))"
    assert json.loads(run_apart(f"import json; from bench import static; {code}")) == row
