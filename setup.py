"""The compiled part of fastpeft. Everything else is in pyproject.toml.

    FASTPEFT_BUILD_CPP=1|0          fastpeft._C: C++ on libtorch's stable ABI, links no CUDA
    FASTPEFT_BUILD_CUDA=auto|0|1    fastpeft._C_cuda: csrc/cuda/*.cu, for TORCH_CUDA_ARCH_LIST

`1` makes anything missing, and any compile error, fail the build. `0` builds nothing: without `_C` the wheel is pure
Python, and the library runs on its PyTorch reference. `auto` builds what nvcc and torch allow, and says what it leaves
out.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel

# nothing newer than torch 2.10 is used (py_limited_api: nor than Python 3.11), so one binary serves all that came after
TORCH_TARGET_VERSION = "0x020a000000000000"
CUDA_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
CXX_FLAGS = [
    "-O3",
    "-ffp-contract=off",  # the bits of the noise are a contract: no two roundings may be fused into one
    "-fvisibility=hidden",
    "-g0",
    # loops vectorise although a square root could set errno and a lane not taken could trap; no result changes
    "-fno-math-errno",
    "-fno-trapping-math",
]


def asked(variable: str, *allowed: str) -> str:
    """The value of an environment variable; the first of those allowed where it is not set."""
    value = os.environ.get(variable, allowed[0])
    if value not in allowed:
        raise SystemExit(f"{variable} is {value!r}; allowed are {', '.join(allowed)}. Correct or unset it.")
    return value


BUILD = {
    "fastpeft._C": asked("FASTPEFT_BUILD_CPP", "1", "0"),
    "fastpeft._C_cuda": asked("FASTPEFT_BUILD_CUDA", "auto", "0", "1"),
}


def left_out(module: str, reason: object) -> None:
    """Say that `module` is not built, or stop where it was demanded."""
    message = f"fastpeft: {module} is not built: {reason}"
    if BUILD[module] != "1":
        print(message, file=sys.stderr)
        return
    variable, without = {
        "fastpeft._C": ("FASTPEFT_BUILD_CPP", "makes the pure-Python wheel, which runs on plain PyTorch"),
        "fastpeft._C_cuda": ("FASTPEFT_BUILD_CUDA", "leaves it out"),
    }[module]
    raise SystemExit(f"{message}. {variable}=0 {without}.")


def find_cuda_home() -> str | None:
    """The toolkit's folder, as nvcc itself tells it: nvcc on the PATH may be a wrapper far away from the toolkit."""
    if "CUDA_HOME" in os.environ or shutil.which("nvcc") is None:
        return os.environ.get("CUDA_HOME")
    plan = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1).strip()) if top else None


def architectures(cuda_home: str) -> str:
    """Those that the toolkit's nvcc knows, the last as PTX too, for newer GPUs: before CUDA 12.8 it refuses 10.0."""
    nvcc = shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    listed = nvcc and subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    known = [name for name in CUDA_ARCHITECTURES if listed and f"compute_{name.replace('.', '')}" in listed]
    return ";".join(known or CUDA_ARCHITECTURES) + "+PTX"


def extensions() -> tuple[list, dict]:
    """The extension modules that can be built here, and the commands that build them."""
    wanted = [module for module in BUILD if BUILD[module] != "0"]
    if not wanted:
        return [], {}
    if cuda_home := find_cuda_home():
        os.environ["CUDA_HOME"] = cuda_home  # torch reads it when it is imported
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(cuda_home))
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        for module in wanted:
            left_out(module, f"{error}; build in isolation, or install torch first")
        return [], {}

    found = []
    if "fastpeft._C" in wanted:
        found.append(cpp_extension())
    if "fastpeft._C_cuda" in wanted and (extension := cuda_extension(cuda_home)) is not None:
        found.append(extension)
    return found, commands()


def cpp_extension() -> Extension:
    """`fastpeft._C`; without a compiler the build stops."""
    from torch.utils.cpp_extension import CppExtension

    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        left_out("fastpeft._C", "no C++ compiler; install one or name it in CXX")
    sources = ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))]
    return CppExtension("fastpeft._C", sources, extra_compile_args={"cxx": CXX_FLAGS}, **common())


def cuda_extension(cuda_home: str | None) -> Extension | None:
    """`fastpeft._C_cuda`, where there are a CUDA compiler and a torch that has CUDA."""
    import torch
    from torch.utils.cpp_extension import CUDAExtension

    if not cuda_home:
        left_out("fastpeft._C_cuda", "no nvcc; put it on the PATH")
        return None
    if torch.version.cuda is None:  # it could not name its CUDA libraries
        left_out("fastpeft._C_cuda", f"torch {torch.__version__} has no CUDA; install one that has")
        return None
    extension = CUDAExtension(
        "fastpeft._C_cuda",
        ["csrc/module.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "--fmad=false"]},
        **common(("USE_CUDA", None)),  # the stream and error shims, of libtorch's CUDA part
    )
    # torch may come with another version of the runtime: bring our own
    extension.libraries = ["cudart_static" if name == "cudart" else name for name in extension.libraries]
    return extension


def common(*macros: tuple[str, str | None]) -> dict:
    """The arguments of both extensions."""
    return {
        "depends": glob("csrc/**/*h", recursive=True),
        "include_dirs": [os.path.abspath("csrc")],
        "define_macros": [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), *macros],
        "py_limited_api": True,
    }


def commands() -> dict:
    """The commands of setuptools that build extensions, and leave out what does not compile."""
    from torch.utils.cpp_extension import BuildExtension

    class build_ext(BuildExtension):  # noqa: N801
        def build_extensions(self) -> None:
            built = self.extensions
            for extension in list(built):
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:  # whatever torch, ninja or the compiler raise
                    left_out(extension.name, f"it did not compile ({error})")
                    built.remove(extension)
            self.extensions = built

    class bdist_wheel(_bdist_wheel):  # noqa: N801
        def run(self) -> None:
            self.run_command("build")  # a module that did not compile has left ext_modules after this
            self.root_is_pure = not self.distribution.has_ext_modules()
            self.skip_build = True  # setuptools would compile everything once more
            super().run()

    return {"build_ext": build_ext, "bdist_wheel": bdist_wheel}


modules, cmdclass = extensions()
setup(ext_modules=modules, cmdclass=cmdclass)
