"""`frspec chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys

from ..console import write_stream, write_summary
from ..errors import RequestError
from ..generator import Generator
from ..options import (
    add_machine_options,
    add_model_options,
    add_request_options,
    add_tree_options,
    generator_options,
    request_options,
)

_EPILOG = """\
in the conversation:
  /reset    forget what was said
  /help     these lines
  /quit     end (Ctrl-D too)
  Ctrl-C    end the answer that is being written

examples:
  frspec chat --model ./model
  frspec chat --model ./model --drafter ./drafter --ranking ranking.safetensors \\
      --vocab-size 16384 --temperature 0.7 --system "Answer in one sentence."
"""
_COMMANDS_HELP = _EPILOG.split("\n\n")[0]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec chat`."""
    parser.description = (
        "A conversation with a model: reads a message a line, writes each answer as it is made."
        " What was said before is not computed again."
    )
    parser.epilog = _EPILOG
    add_model_options(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system message that it begins with")
    group.add_argument("--quiet", action="store_true", help="no summary of each answer on stderr")
    add_request_options(parser)
    add_tree_options(parser)
    add_machine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    generator = Generator(**generator_options(args))
    if not generator.tokenizer.has_chat_template:
        raise RequestError(
            f"{args.model}: the model has no chat template; use `frspec generate --raw`"
        )
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        _enable_line_editing()
        print(_COMMANDS_HELP, file=sys.stderr)
    refused = 0 if interactive else 2  # the exit code behind an error that nobody saw
    code = 0
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return code
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/quit or Ctrl-D ends the conversation)", file=sys.stderr)
            continue
        except UnicodeDecodeError:
            print("frspec: error: expected UTF-8 text", file=sys.stderr)
            code = refused
            continue
        command = line.strip()
        if command in ("/quit", "/exit"):
            return code
        if command == "/reset":
            messages = list(opening)
        elif command == "/help":
            print(_COMMANDS_HELP, file=sys.stderr)
        elif command.startswith("/"):
            print(f"frspec: error: unknown command {command.split()[0]}; /help", file=sys.stderr)
        elif command:
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(generator, messages, args)
            except RequestError as error:
                code = refused
                messages.pop()
                advice = "; /reset begins anew" if messages != opening else ""
                print(f"frspec: error: {error}{advice}", file=sys.stderr)
            except KeyboardInterrupt:  # before there was an answer
                if not interactive:
                    raise
                messages.pop()
                print(file=sys.stderr)
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(generator: Generator, messages: list[dict], args: argparse.Namespace) -> str:
    """Writes the next answer; returns what of it was made when Ctrl-C ends it in a terminal."""
    stream = generator.stream(messages, **request_options(args))
    whole = write_stream(stream)
    print(flush=True)
    if not whole and not sys.stdin.isatty():
        raise KeyboardInterrupt
    if not args.quiet:
        write_summary(stream.result)
    return stream.result.text


def _enable_line_editing() -> None:
    with contextlib.suppress(ImportError):  # not every Python is built with it
        import readline  # noqa: F401
