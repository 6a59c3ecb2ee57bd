"""Command line: python -m bench [options], or one of the commands train and compare."""

import importlib
import os
import signal
import sys

from bench import run
from bench.options import Parser

_PROG = "python -m bench"
_COMMANDS = ("train", "compare")


def _run(words: list[str]) -> int:
    if not words or words[0] not in _COMMANDS:
        return run.run(_PROG, words)
    command = importlib.import_module(f"bench.{words[0]}")
    parser = Parser(prog=f"{_PROG} {words[0]}", description=command.__doc__)
    command.add_arguments(parser)
    return command.run(parser.parse_args(words[1:]))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 if any result was wrong, 2 for bad arguments, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # leaves what was measured, as Ctrl-C does
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
