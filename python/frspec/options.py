"""Command-line options that several commands share, so that they are the same words everywhere."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any

from .errors import RequestError
from .medusa import read_medusa_choices
from .tree import Tree, default_tree


class HelpFormatter(argparse.HelpFormatter):
    """Wraps paragraphs and keeps texts of several lines (the examples) as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" not in text:
            return super()._fill_text(text, width, indent)
        return "".join(indent + line for line in text.splitlines(keepends=True))


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--model, --drafter, --ranking, --vocab-size, --medusa-choices"""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=required, metavar="DIR|HUB", help="model folder, or hub id (owner/name)"
    )
    group.add_argument(
        "--drafter",
        metavar="DIR|HUB",
        help="EAGLE or Medusa drafter of the model (default: none)",
    )
    group.add_argument(
        "--ranking",
        metavar="FILE",
        help="tokens by frequency, made by `frspec rank-tokens`; needed by --vocab-size N",
    )
    group.add_argument(
        "--vocab-size",
        type=vocab_size,
        metavar="N|full",
        help="the drafter scores only the N most frequent tokens (default: full)",
    )
    add_medusa_choices(group)


def add_medusa_choices(group: argparse._ArgumentGroup) -> None:
    """--medusa-choices"""
    group.add_argument(
        "--medusa-choices",
        metavar="NAME|FILE",
        help="nodes of a Medusa drafter's tree: the name of a published tree, cut to the --tree-*"
        ' sizes, or a JSON file: {"accuracies": [[...], ...]} of heads and ranks, or a whole tree'
        " as a list of paths (default: mc_sim_7b_63)",
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype, --max-context, --memory-limit, --threads"""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        metavar="cpu|cuda|auto",
        help="cuda:N for the GPU of that number; auto: a GPU if there is one (default: auto)",
    )
    group.add_argument(
        "--dtype",
        choices=("bf16", "fp16", "fp32"),
        help="of the weights in memory (default: as they are stored)",
    )
    group.add_argument(
        "--max-context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer together (default: the model's, at most 4096)",
    )
    group.add_argument(
        "--memory-limit",
        type=_byte_count,
        metavar="SIZE",
        help="such as 2GB, 512MiB or a number of bytes (default: what the device has)",
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: all that the process may use)",
    )


def add_tree_options(parser: argparse.ArgumentParser) -> None:
    """--tree-depth, --tree-topk, --tree-tokens, --tree-min-probability"""
    group = parser.add_argument_group("draft tree")
    for option, metavar, help, cpu, gpu in (
        ("--tree-depth", "D", "most levels drafted in a round", 4, 6),
        ("--tree-topk", "K", "most nodes drafted from in a level", 4, 10),
        ("--tree-tokens", "N", "most nodes verified in a round", 6, 60),
    ):
        help += f" (default: {cpu} on a CPU, {gpu} on a GPU)"
        group.add_argument(option, type=int, metavar=metavar, help=help)
    group.add_argument(
        "--tree-min-probability",
        type=float,
        metavar="P",
        help="leave out nodes whose path the drafter takes to be less likely; 0 keeps all that the"
        " sizes allow (default: 0.08 on a CPU, 0 on a GPU, where nothing else is possible)",
    )


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """--method, --max-new-tokens, and what add_sampling_options adds"""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--method",
        choices=("plain", "eagle2", "medusa"),
        help="the text is the same (default: the drafter's, plain without one)",
    )
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s"
    )
    add_sampling_options(group)


def add_sampling_options(group: argparse._ArgumentGroup) -> None:
    """--temperature, --top-k, --top-p, --min-p, --seed, --stop"""
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the likeliest token, above it tokens are drawn (default: %(default)s)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="draw from the K likeliest tokens; 0: from all (default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest tokens that hold probability P (default: %(default)s)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens at least P times as likely as the likeliest (default: %(default)s)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="the same seed draws the same text, with any method (default: %(default)s)",
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="STR",
        help="end the text before this string; may be given several times",
    )


def generator_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of Generator and plan_engine."""
    names = ("model", "drafter", "ranking", "vocab_size", "device", "dtype", "max_context")
    options = {name: getattr(args, name) for name in (*names, "memory_limit", "threads")}
    options["tree"] = draft_tree(args)
    if args.medusa_choices is not None:
        options["medusa_choices"] = read_medusa_choices(args.medusa_choices)
    return options


def tree(text: str) -> Tree:
    """The type of an option that takes a whole tree as a text."""
    try:
        return Tree.parse(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("tree: ")) from None


def draft_tree(args: argparse.Namespace) -> Tree | None:
    """The tree of --tree-*, with the defaults for what is not given; None when nothing is."""
    fields = ("depth", "topk", "tokens", "min_probability")
    given = {name: getattr(args, f"tree_{name}") for name in fields}
    given = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(default_tree(args.device), **given) if given else None


def request_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of Generator.generate and Generator.stream beside the prompt."""
    names = ("method", "max_new_tokens")
    return {name: getattr(args, name) for name in names} | sampling_options(args)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What add_sampling_options has added, as arguments of Generator.generate."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop")
    return {name: getattr(args, name) for name in names}


def vocab_size(text: str) -> int | str:
    """A number of tokens from 1, or "full": the type of --vocab-size."""
    if text == "full":
        return text
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of tokens or 'full', found {text!r}")
    return int(text)


def _byte_count(text: str) -> int:
    match = re.fullmatch(
        r"(\d{1,18}(?:\.\d{1,18})?) ?(?:([kmgt]?)(i?)b)?", text.strip(), re.IGNORECASE
    )
    if match is None:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 2GB, 512MiB or 1000000, found {text!r}"
        )
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** " kmgt".index((prefix or " ").lower()))
