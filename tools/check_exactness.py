"""Checks the flagship promise on real prompts: speculative output equals plain output.

For every prompt of a Spec-Bench file (JSON lines with `turns`), every temperature, sub-vocabulary
and tree shape, the token ids written by EAGLE-2 are compared with those the target writes alone
with the same seed. Prints one line per configuration and exits with 1 if any text differs.

    python tools/check_exactness.py --model DIR --drafter DIR --ranking FILE --prompts FILE
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

import frspec
from frspec.evaluation.tasks import spread
from frspec.options import tree

_TREES = ("2x3x4", "4x4x16", "6x10x60")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--ranking", required=True)
    parser.add_argument("--prompts", required=True, type=Path, help="Spec-Bench JSON lines")
    parser.add_argument("--vocab-sizes", nargs="+", default=["full", "8192", "16384", "32768"])
    parser.add_argument(
        "--trees", nargs="+", type=tree, default=[tree(text) for text in _TREES],
        metavar="DEPTHxTOPKxTOKENS[@P]",
    )  # fmt: skip
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, help="prompts, spread evenly over the file")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    questions = spread([json.loads(line)["turns"][0] for line in lines], args.limit or None)
    console = Console(stderr=True)

    def write(
        generator: frspec.Generator, question: str, temperature: float, method: str | None = None
    ):
        return generator.generate(
            [{"role": "user", "content": question}],
            max_new_tokens=args.max_new_tokens,
            temperature=temperature,
            seed=1234,
            method=method,
        )

    # Plain texts once; they are the same for every drafter.
    plain: dict[tuple[int, float], list[int]] = {}
    differing = 0
    configurations = [(size, shape) for size in args.vocab_sizes for shape in args.trees]
    print(f"{'vocabulary':>10} {'tree':>11} {'T':>4} {'prompts':>8} {'tokens':>8} "
          f"{'accept':>7} {'seconds':>8} {'different':>10}")  # fmt: skip
    for size, shape in configurations:
        generator = frspec.Generator(
            args.model,
            args.drafter,
            args.ranking,
            vocab_size=size if size == "full" else int(size),
            threads=args.threads,
            tree=shape,
        )
        for temperature in args.temperatures:
            began = time.perf_counter()
            tokens = rounds = different = 0
            title = f"{size} {shape} T={temperature:g}"
            for index, question in enumerate(
                track(questions, description=title, console=console, transient=True)
            ):
                key = (index, temperature)
                if key not in plain:
                    plain[key] = write(generator, question, temperature, "plain").token_ids
                result = write(generator, question, temperature)
                tokens += sum(result.accept_lengths)
                rounds += len(result.accept_lengths)
                if result.token_ids != plain[key]:
                    different += 1
                    print(f"prompt {index}: differs from plain", file=sys.stderr)
            differing += different
            accept = tokens / rounds if rounds else 0.0
            seconds = time.perf_counter() - began
            print(f"{size:>10} {shape!s:>11} {temperature:>4g} {len(questions):>8} {tokens:>8} "
                  f"{accept:>7.2f} {seconds:>8.1f} {different:>10}", flush=True)  # fmt: skip
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
