"""What a result depends on beside its configuration: versions and devices."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from fastpeft.support.processor import cpu_name, has_bfloat16
from fastpeft.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, of this library and of the packages that decide a result."""
    found = {"python": platform.python_version(), "fastpeft": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    """What a device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else device.type


def devices() -> dict[str, str]:
    """Every device that torch can compute on here."""
    cpu = torch.device("cpu")
    number = torch.get_num_threads()
    threads = f"{number} thread{'s' * (number > 1)}, {torch.backends.cpu.get_cpu_capability()}"
    bfloat16 = ", bfloat16" if has_bfloat16() else ""
    found = {"cpu": f"{device_name(cpu)}, {threads}{bfloat16}"}
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        found[str(device)] = f"{device_name(device)}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def best_device() -> torch.device | str:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or "cpu"
