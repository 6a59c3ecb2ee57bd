"""Builds the CPU kernels with GCC's sanitizers, in folders of their own.

The extension has AddressSanitizer and UndefinedBehaviorSanitizer, whose runtimes come into Python by LD_PRELOAD.
ThreadSanitizer cannot judge a process whose threads are those of an OpenMP that it does not know: it gets threads.cpp,
where csrc/cpu/dispatch.cpp runs on the threads of ATen/Parallel.h in this folder.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cuda_on_cpu.build import BuildError, Ninja, torch_flags
from torch.utils.cpp_extension import get_cxx_compiler

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "sanitize"

COMMON = ["-O1", "-g1", "-fno-omit-frame-pointer"]
# Python's own flags have -fwrapv, with which no sum of integers overflows.
ADDRESS = [*COMMON, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv"]
THREAD = [*COMMON, "-fsanitize=thread", "-pthread"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
KERNEL = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", *WARNINGS]


def run(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] = os.environ, timeout: float = 1800
) -> subprocess.CompletedProcess[str]:
    """With what was said on stdout and stderr together."""
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout,
    )


def _built(command: Sequence[str | Path], environment: Mapping[str, str] = os.environ) -> None:
    done = run(command, ROOT, environment)
    if done.returncode != 0:
        raise BuildError(done.stdout[-8000:])


def _package(folder: Path) -> Path:
    """The Python files of bnext in that folder, but for what a build makes."""
    made = shutil.ignore_patterns("_C.*", "_build.py")
    shutil.copytree(ROOT / "bnext", folder / "bnext", ignore=made, dirs_exist_ok=True)
    return folder


def extension() -> Path:
    """A folder with the package, its extension built for the CPU with ADDRESS; compiles what has changed."""
    folder = BUILD / "address"
    environment = {**os.environ, "BNEXT_FORCE_CPU": "1", "BNEXT_CXXFLAGS": " ".join(ADDRESS)}
    environment.pop("BNEXT_FORCE_CUDA", None)
    arguments = ["--build-lib", folder, "--build-temp", folder / "temp"]
    _built([sys.executable, "setup.py", "-q", "build_ext", *arguments], environment)
    return _package(folder)


def extension_with(csrc: Path, folder: Path) -> Path:
    """The same in another folder, with the scalar unit of another csrc; extension() must have been called."""
    unit = folder / "scalar.o"
    _built([get_cxx_compiler(), *KERNEL, *ADDRESS, "-c", csrc / "cpu/scalar.cpp", "-o", unit])
    objects = [o for o in (BUILD / "address/temp").rglob("*.o") if o.name != unit.name]
    (library,) = (BUILD / "address/bnext").glob("_C.*")
    shutil.copy(BUILD / "address/bnext/_build.py", _package(folder) / "bnext")
    linked = [*torch_flags()[1], "-ltorch_python"]
    _built([get_cxx_compiler(), "-shared", unit, *objects, *linked, "-o", folder / "bnext" / library.name])
    return folder


def preloaded() -> dict[str, str]:
    """The environment of a Python that is to load such an extension. Python itself leaks by design."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = run([get_cxx_compiler(), f"-print-file-name={name}"], ROOT).stdout.strip()
        if not Path(found).is_absolute():
            raise BuildError(f"{get_cxx_compiler()} has no {name}: set CXX to a GCC that has")
        runtimes.append(found)
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {**os.environ, "LD_PRELOAD": " ".join(runtimes), **options}


def threads(csrc: Path = ROOT / "csrc", folder: Path = BUILD / "thread") -> list[str | Path]:
    """The command that runs threads.cpp with the kernels of csrc, built with THREAD; compiles what has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    ninja = Ninja(folder)
    sources = [HERE / "threads.cpp", *sorted(path for path in (csrc / "cpu").glob("*.cpp") if path.stem != "ops")]
    flags = [*KERNEL, *THREAD, f"-I{HERE}", f"-I{csrc}"]
    ninja.link(folder / "threads", [ninja.compile(source, flags) for source in sources], THREAD)
    ninja.run()
    # Where the system gives out addresses at random, ThreadSanitizer may find its own taken.
    fixed = ["setarch", "-R"]
    possible = shutil.which("setarch") and run([*fixed, "true"], ROOT).returncode == 0
    return [*(fixed if possible else []), folder / "threads"]
