"""The command `frspec`: results on stdout, progress and errors on stderr.

Exit codes: 0, 1 (a check that the command makes failed), 2 with one line on stderr (bad input; a
`chat` whose messages are piped goes on with the next one and ends so),
130 (Ctrl-C), 141 (the reader of stdout went away).
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__, convert, demo, ranking
from ..errors import FrspecError
from ..options import HelpFormatter
from . import chat, compare_rankings, evaluate, generate, info, make_synthetic

# name, one line for `frspec --help`, the module with add_arguments(parser) and run(args)
_COMMANDS = (
    ("generate", "write one continuation or answer", generate),
    ("chat", "talk with a model", chat),
    ("convert", "turn a GGUF, PyTorch, EAGLE or Medusa checkpoint into a folder", convert),
    ("rank-tokens", "rank a vocabulary by frequency, for --vocab-size", ranking),
    ("compare-rankings", "what two rankings share, and the text they cover", compare_rankings),
    ("eval", "the paper's evaluations: Spec-Bench, HumanEval, GSM8K", evaluate),
    ("info", "memory plan of a model, and what this build supports", info),
    ("make-synthetic", "write a model of true shape with random weights", make_synthetic),
    ("demo", "fetch a small model and compare the methods on it", demo),
)

_EPILOG = """\
examples:
  frspec demo
  frspec convert model.gguf ./model
  frspec generate --model ./model --prompt "Why is the sky blue?"
  frspec generate --model ./model --drafter ./drafter \\
      --ranking ranking.safetensors --vocab-size 16384 --prompt "Why is the sky blue?"
  frspec COMMAND --help
"""


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line: argparse would print the usage before it."""

    def parse_known_args(self, args=None, namespace=None):
        if self._subparsers is None:  # of a command: a typo is told before what it leaves missing
            self._check_options(list(itertools.takewhile("--".__ne__, args or ())))
        return super().parse_known_args(args, namespace)

    def _check_options(self, words: list[str]) -> None:
        known = self._option_string_actions
        if "-h" in words or "--help" in words:
            return
        for before, word in itertools.pairwise(["", *words]):
            option = word.partition("=")[0]
            if not option.startswith("--") or " " in word or option in known:
                continue
            near = difflib.get_close_matches(option, known, 1)
            if not near and before in known and known[before].nargs is None:
                continue  # meant as its value: argparse says what is wrong with that
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized argument {option}{hint}")

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


class _UsageError(Exception):
    """A command line that does not follow the usage."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (by default the process's) and returns its exit code."""
    if sys.stderr is None:  # closed by who started this
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        return _fail("stdout is closed")
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character the terminal lacks must not end the text
            stream.reconfigure(errors="replace")
    try:
        args = _parser().parse_args(argv)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at its end, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (_UsageError, FrspecError) as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"out of memory: {error}" if str(error) else "out of memory")
    except OSError as error:
        if error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)


def _fail(message: str) -> int:
    print(f"frspec: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="frspec",
        description="Exact, low-latency text generation: a drafter proposes, the model verifies,"
        " and the text is the one the model would have written alone.",
        epilog=_EPILOG,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"frspec {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, summary, module in _COMMANDS:
        command = commands.add_parser(
            name, help=summary, formatter_class=HelpFormatter, allow_abbrev=False
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
