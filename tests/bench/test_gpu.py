"""`python -m bench.gpu`: polite without a GPU, an op's tests before its timings, within its limit, and it goes on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu


@pytest.fixture
def ran(monkeypatch, tmp_path) -> list[tuple[str, float]]:
    """Commands and time limits, instead of running them, as on a machine with a GPU."""
    ran: list[tuple[str, float]] = []
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(gpu, "DONE", tmp_path / "gpu" / "done.json")
    monkeypatch.setattr(gpu, "run", lambda command, timeout_s: ran.append((" ".join(command), timeout_s)) or True)
    return ran


def test_without_a_gpu_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "no GPU" in capsys.readouterr().out


def test_the_tests_of_an_op_come_before_its_benches(ran):
    assert gpu.main([]) == 0
    words = [line for line, _ in ran]
    for stage in gpu.STAGES:
        (tests,) = [i for i, line in enumerate(words) if line.endswith(stage.tests)]
        assert [line.split("bench.")[1] for line in words[tests + 1 : tests + 1 + len(stage.benches)]] == [
            f"{bench} --device cuda" if bench.startswith("bench_") and "--device" not in bench else bench
            for bench in stage.benches
        ]


@pytest.mark.parametrize(("gibibytes", "processes"), [(80, 16), (7.6, 3), (1, 1)])
def test_the_processes_of_the_tests_find_room_on_the_card(ran, monkeypatch, gibibytes, processes):
    card = SimpleNamespace(total_memory=int(gibibytes * 2**30))
    monkeypatch.setattr(gpu.torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(gpu, "PROCESSES", 16)
    gpu.main([])
    tests = [line for line, _ in ran if "pytest" in line]
    assert all(f"--numprocesses={processes} " in line for line in tests)
    assert tests


def test_every_bench_is_in_a_stage():
    named = {bench.split()[0] for stage in gpu.STAGES for bench in stage.benches}
    benches = {file.stem for file in Path(gpu.__file__).parent.glob("bench_*.py")}
    # packs, which a card has none of; and steps that the other benches have
    assert benches - named == {"bench_frozen_linear", "bench_frozen_encoder", "bench_generation", "bench_training"}
    for name in named:
        assert importlib.util.find_spec(f"bench.{name}")


def test_a_call_takes_less_than_nine_minutes(ran):
    gpu.main([])
    assert all(limit <= gpu.LIMIT_S < 9 * 60 for _, limit in ran)


def test_what_fails_its_tests_is_not_timed_and_the_next_op_is(ran, monkeypatch, capsys):
    def run(command, timeout_s):
        ran.append((" ".join(command), timeout_s))
        return "-k siva_linear" not in ran[-1][0]

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main([]) == 1
    words = [line for line, _ in ran]
    assert not any("bench_siva_linear" in line for line in words)
    assert any("bench_window_attention" in line for line in words)
    assert "nothing of it was timed" in capsys.readouterr().out


def test_a_call_goes_on_where_the_last_was_cut_off_until_sources_change(ran, monkeypatch):
    monkeypatch.setattr(gpu, "LIMIT_S", 0.5)
    assert gpu.main([]) == 1
    assert not ran
    monkeypatch.setattr(gpu, "LIMIT_S", 500)
    assert gpu.main([]) == 0
    every = len(ran)
    assert gpu.main([]) == 0
    assert len(ran) == every
    assert gpu.main(["--anew"]) == 0
    monkeypatch.setattr(gpu, "source", lambda: "of other kernels")
    assert gpu.main([]) == 0
    assert len(ran) == 3 * every


def test_a_command_that_takes_too_long_is_stopped(capfd):
    assert not gpu.run([gpu.sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.5)
    assert "rows so far are kept" in capfd.readouterr().out
