"""Proof that the suite can fail: puts the faults of mutations.py into a copy of bnext, one at a time, and runs tests.

    python tests/mutate.py [--list] [NAME ...]

prints which test noticed each, and exits with 1 if a fault went unnoticed. The checkout itself is only read.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation

CHECKOUT = Path(__file__).resolve().parent.parent
NEEDED = ("bnext", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "docs")


class Mistake(Exception):
    """The proof itself does not work: a mutation that has no place, does not compile, or breaks the tests' import."""


def mutated(mutation: Mutation, source: str) -> str:
    """source with the mutation's fault."""
    found = source.count(mutation.old)
    if found != 1:
        raise Mistake(f"{mutation.name}: its text is {found} times in {mutation.file}, not once")
    return source.replace(mutation.old, mutation.new)


class Copy:
    """A built copy of the checkout in an empty folder, to be broken and mended."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "bnext"
        self._built = folder / "built"
        skipped = shutil.ignore_patterns("_C.*", "__pycache__")
        for name in NEEDED:
            source, target = CHECKOUT / name, self.root / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=skipped)
            else:
                shutil.copy2(source, target)
        self._build()
        for name in ("build", "bnext"):
            shutil.copytree(self.root / name, self._built / name)
        self.isa = self._python("-c", "import bnext; print(bnext.ops.cpu_isa)").stdout.strip()

    def has_units_for(self, mutation: Mutation) -> bool:
        """Whether this machine can run what is to notice the mutation."""
        if mutation.unit is not None:
            return self.isa == mutation.unit
        return not mutation.compares_units or self.isa != "scalar"

    def check(self, mutations: list[Mutation]) -> None:
        """Raises Mistake unless the tests of these mutations pass without them."""
        run = self._pytest(tuple(dict.fromkeys(test for m in mutations for test in m.tests)))
        if run.returncode != 0:
            raise Mistake(f"the tests fail without a mutation, or are not there:\n{run.stdout[-4000:]}{run.stderr}")

    def killer(self, mutation: Mutation) -> str | None:
        """The first test that fails with the mutation; None: it survives. The copy is as before afterwards."""
        path = self.root / mutation.file
        before, times = path.read_text(), path.stat()
        path.write_text(mutated(mutation, before))
        try:
            if mutation.compiled:
                self._build()
            run = self._pytest(mutation.tests)
        finally:
            path.write_text(before)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            if mutation.compiled:
                self._mend()
        failed = re.search(r"^FAILED tests/(.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
        if run.returncode == 1 and failed:
            return failed[1]
        if run.returncode == 0:
            return None
        raise Mistake(f"{mutation.name}: no test could judge it\n{run.stdout[-4000:]}{run.stderr}")

    def _build(self) -> None:
        build = self._python("setup.py", "-q", "build_ext", "--inplace")
        if build.returncode != 0:
            raise Mistake(f"the copy does not build:\n{build.stdout[-4000:]}{build.stderr[-4000:]}")

    def _mend(self) -> None:
        """Puts back what the first build made, times included, so that the next build compiles only its own file."""
        for name in ("build", "bnext"):
            shutil.rmtree(self.root / name)
            shutil.copytree(self._built / name, self.root / name)

    def _pytest(self, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        return self._python("-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *tests)

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # Bytecode is told from older bytecode by whole seconds and size: not enough here. Results do not depend on how
        # much a compiler optimises.
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        environment["BNEXT_CXXFLAGS"] = "-O1"
        for name in ("BNEXT_CPU_ISA", "PYTEST_ADDOPTS"):
            environment.pop(name, None)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )


def chosen(names: list[str]) -> list[Mutation]:
    """The mutations of these names, or all."""
    unknown = set(names) - {m.name for m in MUTATIONS}
    if unknown:
        raise Mistake(f"no such mutation: {', '.join(sorted(unknown))}")
    return [m for m in MUTATIONS if not names or m.name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="only say what there is")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a mutation (default: all)")
    options = parser.parse_args()
    killed = left = 0
    try:
        mutations = chosen(options.names)
        widths = [max(len(getattr(m, field)) for m in mutations) for field in ("name", "file", "what")]

        def line(*cells: str) -> None:
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
            print(" | ".join((*padded, *cells[3:])), flush=True)

        line("name", "where", "what was broken", *[] if options.list else ("seconds", "killed by"))
        if options.list:
            for m in mutations:
                line(m.name, m.file, m.what)
            return 0
        with tempfile.TemporaryDirectory() as folder:
            copy = Copy(Path(folder))
            copy.check(mutations)
            for m in mutations:
                if not copy.has_units_for(m):
                    line(m.name, m.file, m.what, "       ", "not tried: this machine lacks the instruction set")
                    continue
                start = time.monotonic()
                try:
                    verdict = copy.killer(m) or "NOTHING"
                except Mistake as mistake:
                    verdict = f"CANNOT TELL: {mistake}"
                missed = verdict.startswith(("NOTHING", "CANNOT"))
                killed, left = killed + (not missed), left + missed
                line(m.name, m.file, m.what, f"{time.monotonic() - start:7.1f}", verdict)
    except Mistake as mistake:
        sys.exit(str(mistake))
    print(f"{killed} of {len(mutations)} killed")
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
