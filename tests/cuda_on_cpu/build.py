"""Builds kernel sources against the runtime that executes them on the CPU.

Kernel sources (.cu) are compiled as C++; in mode "checked" with -fsanitize=thread, whose callbacks the runtime has:
nothing is linked with libtsan, and neither the runtime nor host sources (.cpp) are instrumented.
"""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "cuda_on_cpu"
RUNTIME = [HERE / f"{name}.cpp" for name in ("check", "fibers", "launch", "order", "shared_memory", "sync")]

Mode = Literal["fast", "checked"]

COMMON = ["-std=c++20", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-DBNEXT_CUDA_ON_CPU"]
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# An fma is an instruction, as on a GPU, and only where the source says so. What is not loaded is left undefined: zeros
# would take registers.
KERNEL = [*WARNINGS, "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-mfma", "-ffp-contract=off", "-x", "c++"]
# Accesses reach the runtime as wide as the source has them: vectors neither split nor formed, no loop made a memset.
CHECKED = [
    "-fsanitize=thread",
    "-fno-tree-sra",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    "-fno-store-merging",
    "-fno-tree-loop-distribute-patterns",
]
TORCH = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror"]


class BuildError(Exception):
    """What is missing, or what the compiler said."""


def _candidates() -> Iterator[Path]:
    """Folders that may hold the CUDA toolkit's headers."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        yield Path(home) / "include"
    if nvcc := shutil.which("nvcc"):
        # nvcc may be a wrapper: what it executes says where it is.
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
        shown = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        if top := re.search(r"^#\$ TOP=(.*)$", shown, re.MULTILINE):
            yield Path(top[1].strip()) / "include"
        yield Path(nvcc).resolve().parent.parent / "include"
    spec = find_spec("nvidia")  # the headers as Python packages
    for folder in spec.submodule_search_locations or [] if spec else []:
        yield from sorted(Path(folder).glob("*/include"), reverse=True)


@functools.cache
def toolkit_headers() -> Path | None:
    """The folder of the CUDA toolkit's headers, or None."""
    wanted = ("cuda_runtime_api.h", "vector_types.h", "vector_functions.h", "crt/host_defines.h")
    for folder in _candidates():
        if all((folder / name).is_file() for name in wanted):
            return folder.resolve()
    return None


def _quoted(argument: str | Path) -> str:
    """argument in a command of build.ninja."""
    text = str(argument).replace("$", "$$")
    return text if re.fullmatch(r"[\w@%+=:,./$-]+", text) else "'" + text.replace("'", "'\\''") + "'"


def _path(path: Path) -> str:
    """path as an input or output in build.ninja."""
    return re.sub(r"([$: ])", r"$\1", str(path))


class Ninja:
    """The text of a build.ninja, and its run."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._compiler = os.environ.get("CXX", "c++")
        self._lines = [
            "rule compile",
            f"  command = {_quoted(self._compiler)} -MD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {_quoted(self._compiler)} $in $flags -o $out",
        ]

    def _build(self, rule: str, output: Path, inputs: Sequence[Path], flags: Sequence[str | Path]) -> Path:
        self._lines.append(f"build {_path(output)}: {rule} {' '.join(map(_path, inputs))}")
        self._lines.append(f"  flags = {' '.join(map(_quoted, flags))}")
        return output

    def compile(self, source: Path, flags: Sequence[str | Path]) -> Path:
        return self._build("compile", self._folder / f"{source.name}.o", [source.resolve()], flags)

    def link(self, output: Path, objects: Sequence[Path], flags: Sequence[str | Path]) -> None:
        self._build("link", output, objects, flags)

    def run(self) -> None:
        # Beside this Python first: its environment need not be the active one.
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
        if ninja is None:
            raise BuildError("ninja is not there: pip install ninja")
        if shutil.which(self._compiler) is None:
            raise BuildError(f"the C++ compiler {self._compiler!r} is not there: apt-get install g++, or set CXX")
        file = self._folder / "build.ninja"
        text = "\n".join(self._lines) + "\n"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        done = subprocess.run([ninja, "-f", file], cwd=self._folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BuildError(f"{file}:\n{done.stdout[-8000:]}{done.stderr}")


@contextmanager
def _locked() -> Iterator[None]:
    """One build at a time, of all processes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def torch_flags() -> tuple[list[str | Path], list[str | Path]]:
    """Of the compiler and of the linker."""
    import torch  # only here: kernels alone need none

    home = Path(torch.__path__[0])
    include = [home / "include", home / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = home / "lib"
    return (
        [*TORCH, abi, *(f"-isystem{folder}" for folder in include)],
        [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch"],
    )


def build(
    name: str,
    sources: Sequence[Path],
    mode: Mode,
    *,
    torch: bool = False,
    shared: bool = False,
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path] = (ROOT / "csrc/cuda", ROOT / "csrc"),
) -> Path:
    """The executable, or the shared library, of these sources; compiles what has changed since the last call.

    torch: whether host sources include torch's headers and the result is linked with torch. sources and include_dirs
    may be of a copy of the checkout: another path, like a later time of a file, compiles only what it concerns.
    """
    headers = toolkit_headers()
    if headers is None:
        raise BuildError("the CUDA toolkit's headers are not there: put its nvcc on PATH, or set CUDA_HOME")
    if len({source.name for source in sources}) != len(sources):
        raise BuildError("two sources have the same name")
    common: list[str | Path] = [*COMMON, *(f"-D{define}" for define in defines), f"-I{HERE}"]
    common += [*(f"-I{folder.resolve()}" for folder in include_dirs), f"-isystem{headers}"]
    host: list[str | Path] = [*WARNINGS]
    libraries: list[str | Path] = ["-ldl"]
    if torch:
        host, libraries = torch_flags()
    with _locked():
        runtime = Ninja(BUILD / "runtime")
        plain = [*COMMON, *WARNINGS, f"-I{HERE}", f"-isystem{headers}"]
        # Linked first: of inline functions that kernel sources have too, the runtime must not get instrumented ones.
        objects = [runtime.compile(source, plain) for source in RUNTIME]
        runtime.run()
        folder = BUILD / f"{name}-{mode}"
        ninja = Ninja(folder)
        for source in sources:
            kernel = [*KERNEL, *(CHECKED if mode == "checked" else [])]
            objects.append(ninja.compile(source, [*common, *(kernel if source.suffix == ".cu" else host)]))
        output = folder / (f"{name}.so" if shared else name)
        ninja.link(output, objects, [*(["-shared"] if shared else []), *libraries])
        ninja.run()
    return output
