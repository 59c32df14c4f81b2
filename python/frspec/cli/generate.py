"""`frspec generate`: one prompt, one text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

from ..console import print_json, write_stream, write_summary
from ..errors import ModelError, RequestError
from ..generator import Generator, Prompt, TextStream
from ..options import (
    add_machine_options,
    add_model_options,
    add_request_options,
    add_tree_options,
    generator_options,
    request_options,
)

_EPILOG = """\
examples:
  frspec generate --model ./model --prompt "Why is the sky blue?"
  frspec generate --model ./model --raw --prompt "Once upon a time" --temperature 0.8 --seed 7
  frspec generate --model ./model --drafter ./drafter --ranking ranking.safetensors \\
      --vocab-size 16384 --prompt-file question.txt --json
  git diff | frspec generate --model ./model --prompt-file -
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec generate`."""
    parser.description = (
        "Writes the model's answer to a prompt to stdout as it is made, and a summary to stderr."
        " The text does not depend on drafter, ranking, vocabulary size, tree, method or threads."
    )
    parser.epilog = _EPILOG
    add_model_options(parser)
    group = parser.add_argument_group("prompt (one of the three is needed)")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the user's message")
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="read it from a UTF-8 file, less a newline at its end; - reads stdin",
    )
    source.add_argument(
        "--token-ids",
        metavar="FILE",
        help="take token ids instead: a JSON list, or numbers apart by spaces or commas;"
        " - reads stdin",
    )
    group.add_argument(
        "--raw",
        action="store_true",
        help="continue the text as it is instead of answering it in the model's chat template",
    )
    add_request_options(parser)
    add_tree_options(parser)
    add_machine_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object at the end: text, token_ids, prompt_tokens, finish_reason,"
        " accept_lengths, timings, reused_tokens, device, method",
    )
    group.add_argument("--quiet", action="store_true", help="no summary on stderr")


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    prompt = _read_prompt(args)  # first: a mistake there should not wait for the weights
    generator = Generator(**generator_options(args))
    if isinstance(prompt, str) and not args.raw:
        if not generator.tokenizer.has_chat_template:
            raise RequestError(
                f"{args.model}: the model has no chat template; with --raw it continues the prompt"
            )
        prompt = [{"role": "user", "content": prompt}]
    stream = generator.stream(prompt, **request_options(args))
    finished = _exhaust(stream) if args.json else write_stream(stream)
    result = stream.result
    if args.json:
        print_json(dataclasses.asdict(result))
    elif not _has_tokenizer(generator):
        print(*result.token_ids)
    elif not result.text.endswith("\n"):
        print()
    sys.stdout.flush()
    if not args.json and not args.quiet:
        write_summary(result)
    return 0 if finished else 130


def _exhaust(stream: TextStream) -> bool:
    """Runs a stream to its end; False when Ctrl-C ended it, which closes it."""
    try:
        for _ in stream:
            pass
    except KeyboardInterrupt:
        stream.close()
        return False
    return True


def _has_tokenizer(generator: Generator) -> bool:
    try:
        return generator.tokenizer is not None
    except ModelError:
        return False


def _read_prompt(args: argparse.Namespace) -> Prompt:
    if args.token_ids is not None:
        return _parse_token_ids(_read(args.token_ids, "--token-ids"), args.token_ids)
    text, option = args.prompt, "--prompt"
    if text is None:
        option = f"--prompt-file {args.prompt_file}"
        text = _read(args.prompt_file, "--prompt-file")
        text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise RequestError(f"{option}: the prompt is empty; at least one character is needed")
    return text


def _read(name: str, option: str) -> str:
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"{option} {name}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{option} {name}: expected UTF-8 text, found byte {data[error.start]:#04x}"
            f" at offset {error.start}"
        ) from None


def _parse_token_ids(text: str, name: str) -> list[int]:
    where = f"--token-ids {name}"
    if text.lstrip().startswith("["):
        try:
            token_ids = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}: cannot be read as JSON: {error}") from None
    else:
        words = text.replace(",", " ").split()
        token_ids = [int(w) if re.fullmatch(r"-?[0-9]{1,18}", w) else w for w in words]
    for position, token_id in enumerate(token_ids):
        if type(token_id) is not int:
            raise RequestError(
                f"{where}: expected whole numbers, found {token_id!r:.40} at position {position}"
            )
    if not token_ids:
        raise RequestError(f"{where}: the prompt is empty; at least one token is needed")
    return token_ids
