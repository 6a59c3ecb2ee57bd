"""Command line: python -m bnext [--json], the environment report; python -m bnext stats CHECKPOINT; plan NxCxHxW."""

import argparse
import importlib
import os
import sys

from bnext.output import first_line

_PROG = "python -m bnext"
_COMMANDS = {"plan": "plans", "stats": "stats"}  # word: module


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 if something is wrong, standard output included, 2 for bad arguments, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    name = words[0] if words and words[0] in _COMMANDS else None
    try:
        command = importlib.import_module(f"bnext.{_COMMANDS[name] if name else 'environment'}")
    except Exception as error:  # torch is not there, or broken
        print(f"{_PROG} {name}: {first_line(error)}", file=sys.stderr)
        return 1
    parser = argparse.ArgumentParser(
        prog=f"{_PROG} {name}" if name else _PROG,
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    try:
        code = command.run(parser.parse_args(words[1:] if name else words))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # whoever read standard output has seen enough
            return 141
        print(f"{parser.prog}: standard output: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # closed, as by >&-
    sys.stdout.reconfigure(errors="backslashreplace")  # layers and files have names that not every encoding has
    sys.exit(main())
