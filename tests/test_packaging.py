"""What a user installs: wheels, sdist and editable installs, used in new environments outside the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import fastpeft._C
import pytest
import torch

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = sysconfig.get_path("purelib")
WHEEL_LIMIT = 5 * 2**20  # bytes
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")

# what an installed fastpeft must do: import, say what it runs on, draw the noise, run a kernel's reference
USE = """
import torch
from fastpeft import functional
from fastpeft.ops import backends, reference
import fastpeft, fastpeft.kernels
chosen = {c.op: c for c in backends.choices() if c.device == "cpu"}["mezo_perturb_"]
ours, theirs = torch.zeros(1000), torch.zeros(1000)
functional.mezo_perturb_([ours], [5], [7], [1.0])
reference.mezo_perturb_([theirs], [5], [7], [1.0], 0.0)
assert torch.equal(ours, theirs) and ours.std() > 0.9
print(chosen.backend, "|", chosen.reason, "|", fastpeft.__file__, "|", list(fastpeft.kernels.__path__)[0])
"""


def _run(command: list[str | Path], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`command` without what this session sets; nvcc, which takes a minute, is left to the test that asks for it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("FASTPEFT_", "PYTHON"))}
    environment = inherited | {"FASTPEFT_BUILD_CUDA": "0"} | variables
    return subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)


def _succeed(command: list[str | Path], cwd: Path, **variables: str) -> str:
    done = _run(command, cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def _copy_source(target: Path) -> Path:
    """The files of the package, without what a build or a run leaves beside them."""
    target.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target)
    shutil.copy(ROOT / "requirements-dev.lock", target)
    left_behind = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("fastpeft", "csrc"):
        shutil.copytree(ROOT / name, target / name, ignore=left_behind)
    return target


def _build(source: Path, kind: str, **variables: str) -> tuple[Path, str]:
    """The sdist or wheel built from `source`, and what the build said."""
    said = _succeed([sys.executable, "-m", "build", f"--{kind}", "--no-isolation"], source, **variables)
    (built,) = (source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built, said


def _new_environment(folder: Path) -> Path:
    """A new virtual environment that sees this one's packages, though not what is installed here as editable."""
    _succeed([sys.executable, "-m", "venv", "--without-pip", folder], ROOT)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(SITE_PACKAGES + "\n")
    return folder / "bin" / "python"


def _install(python: Path, *arguments: str | Path) -> None:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    _succeed([*pip, "--ignore-installed", *arguments], python.parent)


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    sdist, _ = _build(_copy_source(folder / "source"), "sdist", FASTPEFT_BUILD_CPP="0")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    return tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return _copy_source(tmp_path / "source")


@pytest.mark.long
@needs_compiler
def test_a_wheel_from_the_sdist_with_the_compiled_part(sdist_tree: Path, tmp_path: Path) -> None:
    wheel, said = _build(sdist_tree, "wheel")
    assert said.count("running build_ext") == 1
    assert "-cp311-abi3-" in wheel.name
    assert wheel.stat().st_size <= WHEEL_LIMIT
    names = _names(wheel)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastpeft").rglob("*.py")}
    assert {"fastpeft/_C.abi3.so", "fastpeft/py.typed"} | modules <= names
    assert not [name for name in names if not name.startswith("fastpeft")]

    python = _new_environment(tmp_path / "environment")
    _install(python, wheel)
    backend, _, package, kernels_at = _succeed([python, "-c", USE], tmp_path).split(" | ")
    assert backend == "cpp"
    assert Path(package).is_relative_to(tmp_path)
    assert Path(kernels_at.strip()).is_relative_to(tmp_path)
    said = _succeed([python.parent / "fastpeft", "info"], tmp_path)
    assert "mezo_perturb_" in said


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_cuda_module_is_built_and_left_alone_without_a_card(source: Path, tmp_path: Path) -> None:
    wheel, _ = _build(source, "wheel", FASTPEFT_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert {"fastpeft/_C.abi3.so", "fastpeft/_C_cuda.abi3.so"} <= _names(wheel)
    python = _new_environment(tmp_path / "environment")
    _install(python, wheel)
    watched = "\nimport sys\nassert 'fastpeft._C_cuda' not in sys.modules or torch.cuda.is_available()"
    assert _succeed([python, "-c", USE + watched], tmp_path).startswith("cpp")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_nvcc_beside_a_torch_without_cuda_builds_nothing_for_cards() -> None:
    setup = "import runpy, sys, torch\ntorch.version.cuda = None\nsys.argv = ['setup.py', '--name']\n"
    said = _succeed([sys.executable, "-c", setup + "runpy.run_path('setup.py')"], ROOT, FASTPEFT_BUILD_CUDA="auto")
    assert "fastpeft._C_cuda is not built: torch" in said
    assert "has no CUDA" in said


@pytest.mark.parametrize(
    ("known", "expected"),
    [("75 80 86 87 89 90", "7.5;8.0;8.6;8.9;9.0+PTX"), ("75 80 86 89 90 100 120", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX")],
)
def test_the_cuda_module_is_for_the_gpus_that_nvcc_knows(known: str, expected: str, tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {known}\n")
    nvcc.chmod(0o755)
    setup = (
        "import os, runpy, sys\nos.environ.pop('TORCH_CUDA_ARCH_LIST', None)\nsys.argv = ['setup.py', '--name']\n"
        "runpy.run_path('setup.py')\nprint('for', os.environ['TORCH_CUDA_ARCH_LIST'])"
    )
    variables = {"CUDA_HOME": str(tmp_path), "FASTPEFT_BUILD_CUDA": "auto"}
    said = _succeed([sys.executable, "-c", setup], ROOT, **variables)
    assert f"for {expected}\n" in said


def test_a_change_of_any_header_compiles_again() -> None:
    setup = "import runpy, sys\nsys.argv = ['setup.py', '--name']\ncommon = runpy.run_path('setup.py')['common']\n"
    said = _succeed([sys.executable, "-c", setup + "print(*common()['depends'])"], ROOT, FASTPEFT_BUILD_CPP="0")
    headers = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.suffix in (".h", ".cuh")}
    assert headers <= set(said.split())


@pytest.mark.long
def test_a_pure_wheel_needs_no_torch_at_build_time(source: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch')\n")
    wheel, _ = _build(source, "wheel", PYTHONPATH=str(tmp_path), FASTPEFT_BUILD_CPP="0")
    assert wheel.name.endswith("-py3-none-any.whl")

    python = _new_environment(tmp_path / "environment")
    _install(python, wheel)
    backend, reason, package, _ = _succeed([python, "-c", USE], tmp_path / "environment").split(" | ")
    assert backend == "reference"
    assert "fastpeft._C was not built" in reason
    assert Path(package).is_relative_to(tmp_path)


@pytest.mark.long(but="variables2-FASTPEFT_BUILD_CPP is 'maybe'; allowed are 1, 0")
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"CXX": "no-such-compiler"}, "fastpeft._C is not built: no C++ compiler; install one or name it in CXX."),
        ({"CXX": "false"}, "fastpeft._C is not built: it did not compile"),
        ({"FASTPEFT_BUILD_CPP": "maybe"}, "FASTPEFT_BUILD_CPP is 'maybe'; allowed are 1, 0"),
        ({"FASTPEFT_BUILD_CUDA": "1", "CUDA_HOME": "", "PATH": "/bin"}, "fastpeft._C_cuda is not built: no nvcc"),
    ],
)
def test_what_cannot_be_built_fails_and_names_the_variable_that_leaves_it_out(
    source: Path, variables: dict, message: str
) -> None:
    done = _run([sys.executable, "setup.py", "--quiet", "bdist_wheel"], source, **variables)
    assert done.returncode != 0
    assert message in done.stderr
    variable = "FASTPEFT_BUILD_CUDA" if "FASTPEFT_BUILD_CUDA" in variables else "FASTPEFT_BUILD_CPP"
    assert "is not built" not in message or f"{variable}=0" in done.stderr


@pytest.mark.slow
@needs_compiler
def test_an_editable_install(source: Path, tmp_path: Path) -> None:
    python = _new_environment(tmp_path / "environment")
    _install(python, "--no-build-isolation", "--editable", source)
    backend, _, package, kernels = _succeed([python, "-c", USE], tmp_path).split(" | ")
    assert backend == "cpp"
    assert Path(package).is_relative_to(source)
    assert Path(kernels.strip()) == source / "fastpeft" / "kernels"
    # and from the repository's own root
    assert _succeed([python, "-c", USE], source).startswith("cpp")


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_compiled_part_calls_what_torch_promises_to_keep() -> None:
    """Of torch the declarations of its stable ABI, and a few more, of which those of oneDNN may be missing."""
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    stable = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h")
    declared = set(re.findall(r"\w+", "".join((headers / each).read_text() for each in stable)))
    used = _succeed(["nm", "-D", "--undefined-only", fastpeft._C.__file__], ROOT)
    called = set(re.findall(r" [Uw] ((?:aoti_)?torch_\w+)", used))
    products = {"addmm_out", "mm_out", "_linear_pointwise", "_linear_pointwise_binary"}
    assert called - declared == {f"aoti_torch_cpu_{product}" for product in products}


@pytest.mark.long
def test_importing_needs_neither_triton_nor_the_compiled_module(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['triton'] = None; sys.modules['fastpeft._C'] = None\n"
    backend = _succeed([sys.executable, "-c", hidden + USE], tmp_path, PYTHONPATH=str(ROOT)).split(" | ")[0]
    assert backend == "reference"


@pytest.mark.long
def test_importing_after_torch_and_peft_loads_nothing_heavy() -> None:
    program = (
        "import sys, torch, peft\nbefore = set(sys.modules)\nimport fastpeft, fastpeft.functional\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "from transformers import AutoModelForSequenceClassification, RobertaConfig, Trainer"
    )
    loaded = _succeed([sys.executable, "-c", program], ROOT).split()
    heavy = (
        "datasets",
        "sklearn",
        "scipy",
        "pandas",
        "pyarrow",
        "matplotlib",
        "typer",
        "triton",
        "transformers.trainer",
    )
    assert "fastpeft.functional" in loaded
    assert not [name for name in loaded if name.startswith(heavy)]
