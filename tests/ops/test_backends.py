"""One implementation for each op and device, chosen once, with a reason."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from backbones import ladder, tiny
from peft import get_peft_model

from fastpeft import SivaConfig
from fastpeft.errors import FastpeftError
from fastpeft.ops import backends
from fastpeft.ops.define import NAMESPACE, OPS


def available(name: str) -> str:
    return ""


def absent(name: str) -> str:
    return f"{name} is not here"


def python(code: str, setting: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, backends.VARIABLE: setting}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_every_op_has_a_choice_for_every_device() -> None:
    assert {(choice.op, choice.device) for choice in backends.choices()} == {
        (op, device) for op in OPS for device in ("cpu", "cuda")
    }
    assert all(choice.reason for choice in backends.choices())


@pytest.mark.parametrize("device", ["MPS", "XPU", "HPU"])
def test_other_devices_run_the_reference(device: str) -> None:
    for op in OPS:
        name = f"{NAMESPACE}::{op}"
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, device), op
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(name, device), "else the reference is not reached"


def test_the_first_that_is_available_is_taken() -> None:
    for op in ("siva_linear", "siva_linear_backward"):
        assert backends._choose(op, "cuda", None, available).backend == "triton"
    without_triton = backends._choose(
        "siva_linear", "cuda", None, lambda name: absent(name) if name == "triton" else ""
    )
    assert without_triton.backend == "aten"
    assert without_triton.reason == "triton is unavailable (triton is not here)"
    assert backends._choose("mezo_perturb_", "cpu", None, absent).backend == "reference"
    without_module = backends._choose(
        "mezo_perturb_", "cuda", None, lambda name: absent(name) if name == "cuda" else ""
    )
    assert without_module.backend == "triton"


def test_a_triton_that_cannot_start_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no C compiler, by which it builds its driver; else the first launch would fail."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    def build(_: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(driver), "active", property(build))
    choice = backends._choose("siva_linear", "cuda", None, backends._why_not.__wrapped__)
    assert choice.backend == "aten"
    assert choice.reason == (
        "triton is unavailable (triton cannot start, for which it needs a C compiler and the headers of Python: "
        "Failed to find C compiler.)"
    )


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert backends._choose("siva_linear", "cuda", "aten", available).backend == "aten"
    assert backends._choose("mezo_perturb_", "cpu", "reference", available).backend == "reference"
    with pytest.raises(FastpeftError, match=r"siva_linear=triton, but triton is not here"):
        backends._choose("siva_linear", "cuda", "triton", absent)


@pytest.mark.parametrize("text", ["siva_linear", "siva_linear=cublas", "silu=triton", "siva_linear=aten;x=y"])
def test_unreadable_settings_are_refused(text: str) -> None:
    with pytest.raises(FastpeftError, match=r"allowed are OP=NAME"):
        backends._overrides(text)


def test_a_backend_that_an_op_does_not_have_is_refused() -> None:
    with pytest.raises(FastpeftError, match=r"mezo_perturb_ runs on cpp, cuda, reference, triton only"):
        backends._overrides("mezo_perturb_=aten")


def test_a_setting_leaves_devices_alone_that_it_does_not_fit() -> None:
    assert backends._choose("siva_linear", "cpu", "triton", available).backend == "cpp"


def test_several_settings() -> None:
    assert backends._overrides(" mezo_perturb_=reference, siva_linear=aten,") == {
        "mezo_perturb_": "reference",
        "siva_linear": "aten",
    }


@pytest.mark.long
def test_a_setting_holds_for_the_process() -> None:
    code = (
        "import torch\n"
        "from fastpeft import functional\nfrom fastpeft.ops import backends, reference\n"
        "print(next(c.backend for c in backends.choices() if (c.op, c.device) == ('mezo_perturb_', 'cpu')))\n"
        "functional.mezo_perturb_([torch.zeros(5)], [0], [1], [1.0])"
    )
    done = python(code, "mezo_perturb_=reference")
    assert done.stdout.strip() == "reference", done.stderr


@pytest.mark.long
def test_a_missing_backend_lets_the_import_pass_and_stops_every_op() -> None:
    code = (
        "import torch, fastpeft\n"
        "try: fastpeft.functional.siva_linear(*(torch.ones(s) for s in ((2, 3), (4, 3), (4, 1), (1,), (1, 3))))\n"
        "except fastpeft.FastpeftError as error: print(error)"
    )
    done = python(code, "mezo_perturb_=aten")
    assert "mezo_perturb_ runs on cpp, cuda, reference, triton only" in done.stdout, done.stderr


def test_an_installation_without_the_compiled_part_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> None:
        get_peft_model(tiny(), SivaConfig(r=2, target_modules=["query"]))
        ladder(window_size=1)

    monkeypatch.setattr(backends, "best_device", lambda: "cpu")
    backends.warn_if_not_compiled.cache_clear()
    make()
    assert "not built" not in caplog.text
    monkeypatch.setattr(backends, "_why_not", lambda backend: f"{backend} was not built")
    backends.warn_if_not_compiled.cache_clear()
    make()
    assert caplog.text.count("cpp was not built, so runs are slower; install fastpeft as its README says") == 1
