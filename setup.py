"""Builds bnext._C against the installed torch. Which files are compiled decides what is built.

CUDA kernels are built where torch was built for CUDA and nvcc is there; BNEXT_FORCE_CUDA=1 builds them wherever nvcc
is, BNEXT_FORCE_CPU=1 leaves them out. TORCH_CUDA_ARCH_LIST names the architectures; without it, those of the GPUs at
hand, or, where there is none, ARCHS. BNEXT_CXXFLAGS adds flags for the C++ compiler, such as those of a sanitizer.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit("bnext is built against your torch: pip install torch, then pip install --no-build-isolation .")

ARCHS = "8.0;9.0;10.0;12.0+PTX"


class Build(cpp_extension.BuildExtension):
    """Says in bnext/_build.py, beside the extension, what it was built with: to be read where it does not load, too."""

    def run(self) -> None:
        file = Path("" if self.inplace else self.build_lib) / "bnext" / "_build.py"
        text = '"""What bnext._C was built with; written by setup.py."""\n\n'
        text += "".join(f"{name} = {value!r}\n" for name, value in facts.items())
        if not file.exists() or file.read_text() != text:
            self.force = True  # setuptools alone, without ninja, looks at nothing but the sources
        super().run()
        file.write_text(text)

    def build_extensions(self) -> None:
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            sys.exit(f"bnext needs a C++ compiler and {compiler!r} is not there: apt-get install g++, or set CXX.")
        super().build_extensions()


def toolkit() -> Path | None:
    """The CUDA toolkit's folder: CUDA_HOME, or where the nvcc on PATH says it is, which may be a wrapper script."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE):
            return Path(top[1]).resolve()
    return Path(cpp_extension.CUDA_HOME) if cpp_extension.CUDA_HOME else None


def fault(home: Path | None) -> str | None:
    """Why this toolkit cannot build CUDA kernels for this torch, or None if it can."""
    if home is None:
        return "there is no nvcc on PATH and CUDA_HOME is not set"
    header = home / "include" / "cuda.h"
    version = re.search(r"#define CUDA_VERSION (\d+)", header.read_text()) if header.exists() else None
    if version is None:
        return f"{home} has no CUDA headers"
    major, torchs = int(version[1]) // 1000, torch.version.cuda
    if torchs and int(torchs.split(".")[0]) != major:
        return f"{home} is CUDA {major}, and torch was built for CUDA {torchs}"
    return None


def cuda() -> tuple[Path | None, str]:
    """The toolkit that CUDA kernels are to be built with, or None and why there will be none."""
    force_cpu, force_cuda = (os.environ.get(f"BNEXT_FORCE_{name}") == "1" for name in ("CPU", "CUDA"))
    if force_cpu and force_cuda:
        sys.exit("BNEXT_FORCE_CPU=1 and BNEXT_FORCE_CUDA=1 exclude each other: unset one.")
    if force_cpu:
        return None, "BNEXT_FORCE_CPU=1 left them out"
    if not (force_cuda or torch.version.cuda):
        return None, f"torch {torch.__version__} was built without CUDA"
    home = toolkit()
    found = fault(home)
    if found:
        if force_cuda:
            sys.exit(f"BNEXT_FORCE_CUDA=1 needs a CUDA toolkit: {found}.")
        print(f"bnext: building without CUDA kernels: {found}.", file=sys.stderr)
        return None, found
    return home, ""


def arch_flags() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, with one PTX for all architectures for which the source is the same.

    That is what compiling takes longest for: the source looks at whether there are conversions of pairs (8.0) and
    clusters (9.0), and at nothing else; for 10.0 and later PTX of their own saves registers. Architectures with a
    letter are left as they are.
    """
    least: dict[tuple[bool, ...], str] = {}

    def shared(found: re.Match[str]) -> str:
        number = int(found[1])
        virtual = least.setdefault(tuple(number >= new for new in (80, 90, 100)), found[1])
        code = f"compute_{virtual}" if found[2].startswith("compute") else found[2]
        return f"arch=compute_{virtual},code={code}"

    flags = sorted(cpp_extension._get_cuda_arch_flags(), key=lambda flag: int(re.search(r"\d+", flag)[0]))
    return [re.sub(r"arch=compute_(\d+),code=(\w+)", shared, flag) for flag in flags]


def cuda_facts(home: Path) -> dict[str, object]:
    """nvcc's version, and the architectures of the kernels, as torch.cuda.get_arch_list names them."""
    version = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    named = re.search(r"V([\d.]+)", version)
    archs = [flag.rpartition("=")[2] for flag in arch_flags()]
    return {
        "nvcc": named[1] if named else "unknown",
        "cuda_archs": sorted(archs, key=lambda a: (a[0] == "c", len(a), a)),
    }


flags = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
flags += [
    "-Wno-unused-parameter",
    "-Wno-psabi",
]  # of torch's headers; of vectors wider than the base registers
if sys.platform == "linux":
    flags.append("-fopenmp")  # at::parallel_for is serial without; torch brings the runtime, so nothing to link
flags += os.environ.get("BNEXT_CXXFLAGS", "").split()  # last: they win

sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
nvcc_flags: list[str] = []
links: dict[str, list[str]] = {}
home, no_cuda = cuda()
facts: dict[str, object] = {"torch": torch.__version__, "no_cuda": no_cuda, "nvcc": "", "cuda_archs": []}
if home:
    sources += glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")
    cpp_extension.CUDA_HOME = str(home)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHS
    facts |= cuda_facts(home)
    nvcc_flags = ["-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden", *arch_flags()]
    # The CUDA runtime is linked in, so that the extension loads whatever CUDA torch has, or has not.
    links = {
        "include_dirs": [str(home / "include")],
        "library_dirs": [str(folder) for name in ("lib64", "lib") if (folder := home / name).is_dir()],
        "libraries": ["cudart_static", "rt", "dl", "pthread"],
    }
else:
    sources += glob("csrc/cuda_absent/*.cpp")

setup(
    ext_modules=[
        cpp_extension.CppExtension(
            "bnext._C",
            sorted(sources),
            define_macros=[("BNEXT_TORCH", torch.__version__)],  # read by nothing: with another torch, all is compiled
            extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
            **links,
        )
    ],
    cmdclass={"build_ext": Build},
)
