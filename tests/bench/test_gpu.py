"""`python -m bench.gpu`: polite without a GPU, tests before timings, within its limit."""

from __future__ import annotations

import pytest

from bench import gpu


@pytest.fixture
def ran(monkeypatch) -> list[tuple[list[str], float]]:
    """Commands and time limits, instead of running them, as on a machine with a GPU."""
    ran: list[tuple[list[str], float]] = []
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda command, timeout_s: ran.append((command, timeout_s)) or True)
    return ran


def test_without_a_gpu_it_says_so_and_succeeds(monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main() == 0
    assert "no GPU" in capsys.readouterr().out


def test_kernels_then_marked_tests_then_benches(ran):
    assert gpu.main() == 0
    words = [" ".join(command) for command, _ in ran]
    assert words[0].endswith("tests/kernels")
    assert "-m gpu" in words[1]
    assert "tests/training/test_memory.py" in words[1]
    for bench in ("siva_linear", "siva_linear_mixed", "window_attention", "mezo_perturb"):  # of each op
        assert any(line.endswith(f"bench.bench_{bench} --device cuda") for line in words[2:])


def test_limits_add_up_to_less_than_nine_minutes(ran):
    gpu.main()
    limits = [timeout_s for _, timeout_s in ran]
    assert all(limit <= gpu.LIMIT_S for limit in limits)
    assert gpu.LIMIT_S < 9 * 60
    assert limits[0] <= gpu.TESTS_SHARE * gpu.LIMIT_S


def test_nothing_is_timed_when_tests_fail(ran, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run", lambda command, _: ran.append((command, 0)))
    assert gpu.main() == 1
    assert len(ran) == 1
    assert "nothing was timed" in capsys.readouterr().out


def test_a_command_that_takes_too_long_is_stopped(capfd):
    assert not gpu.run([gpu.sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.5)
    assert "rows so far are kept" in capfd.readouterr().out
