"""Builds bnext._C against the installed torch. Which files are compiled decides what is built.

BNEXT_FORCE_CPU=1 leaves csrc/cuda out; BNEXT_FORCE_CUDA=1 takes it in where torch or nvcc would not.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, get_cxx_compiler
except ImportError:
    sys.exit("bnext is built against your torch: pip install torch, then pip install --no-build-isolation .")


class Build(BuildExtension):
    def build_extensions(self) -> None:
        compiler = get_cxx_compiler()
        if shutil.which(compiler) is None:
            sys.exit(f"bnext needs a C++ compiler and {compiler!r} is not there: apt-get install g++, or set CXX.")
        super().build_extensions()


def sources() -> list[str]:
    """The CPU sources, and the CUDA ones where they can be built or are asked for."""
    force_cpu, force_cuda = (os.environ.get(f"BNEXT_FORCE_{name}") == "1" for name in ("CPU", "CUDA"))
    if force_cpu and force_cuda:
        sys.exit("BNEXT_FORCE_CPU=1 and BNEXT_FORCE_CUDA=1 exclude each other: unset one.")
    cuda = glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")
    if force_cuda and not cuda:
        sys.exit("BNEXT_FORCE_CUDA=1: this version of bnext has no CUDA kernels; unset it to build for the CPU.")
    wanted = force_cuda or (not force_cpu and torch.version.cuda is not None and CUDA_HOME is not None)
    return sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + (cuda if wanted else []))


flags = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
flags += [
    "-Wno-unused-parameter",
    "-Wno-psabi",
]  # of torch's headers; of vectors wider than the base registers
if sys.platform == "linux":
    flags.append("-fopenmp")  # at::parallel_for is serial without; torch brings the runtime, so nothing to link

setup(
    ext_modules=[
        CppExtension(
            "bnext._C",
            sources(),
            define_macros=[("BNEXT_TORCH_VERSION", torch.__version__)],
            extra_compile_args=flags,
        )
    ],
    cmdclass={"build_ext": Build},
)
