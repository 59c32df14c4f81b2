"""Measures tree shapes: how much faster than plain decoding each one writes the same prompts.

For every prompt, plain decoding, every tree and plain decoding again run one after the other. A
tree's speed-up is the mean of the two plain times over its own, and the first tree's time over its
own; printed are the medians over the prompts, so that a noisy machine disturbs all sides alike.
With the binary bench_cpu, also of those prompts alone during which the cores shared a cache, or
did not.

    python tools/sweep_trees.py --model DIR --drafter DIR --ranking FILE --vocab-size 8192 \\
        --prompts spec_bench.jsonl --trees 1x3x4 4x4x6@0.08 --bench build/tests/bench_cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

import frspec
from frspec.evaluation.tasks import spread
from frspec.options import tree, vocab_size
from measure_cpu import cores


@dataclasses.dataclass
class Writing:
    """A prompt's continuation by every tree."""

    cores: str  # "near", "apart", "both", or "unknown"
    plain_s: float
    drafted: list[frspec.Result]  # one for each tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True, help="EAGLE drafter or Medusa heads")
    parser.add_argument("--ranking")
    parser.add_argument(
        "--vocab-size", default="full", type=vocab_size, help="columns of the draft head, or full"
    )
    parser.add_argument("--prompts", required=True, type=Path, help="Spec-Bench JSON lines")
    parser.add_argument("--limit", type=int, default=8, help="prompts, spread over the file")
    parser.add_argument(
        "--trees", nargs="+", required=True, type=tree, metavar="DEPTHxTOPKxTOKENS[@P]"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bench", help="the binary bench_cpu: tells where the cores are")
    args = parser.parse_args()

    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    questions = spread([json.loads(line)["turns"][0] for line in lines], args.limit)
    generators = [
        frspec.Generator(
            args.model,
            args.drafter,
            args.ranking,
            vocab_size=args.vocab_size,
            max_context=2048,
            threads=args.threads,
            tree=shape,
        )
        for shape in args.trees
    ]

    def write(generator: frspec.Generator, question: str, method: str | None) -> frspec.Result:
        return generator.generate(
            [{"role": "user", "content": question}],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=1,
            method=method,
            ignore_eos=True,
        )

    writings = []
    for question in track(questions, console=Console(stderr=True), transient=True):
        place = cores(args.bench) if args.bench else "unknown"
        before = write(generators[0], question, "plain")
        drafted = [write(generator, question, None) for generator in generators]
        after = write(generators[0], question, "plain")
        if args.bench and cores(args.bench) != place:
            place = "both"
        for shape, result in zip(args.trees, drafted, strict=True):
            if result.token_ids != before.token_ids:
                sys.exit(f"{shape}: the text differs from plain decoding's")
        plain_s = (before.timings.decode_s + after.timings.decode_s) / 2
        writings.append(Writing(place, plain_s, drafted))

    print_table("all prompts", args.trees, writings)
    for place in ("near", "apart"):
        print_table(f"cores {place}", args.trees, [w for w in writings if w.cores == place])


def print_table(title: str, trees: list[frspec.Tree], writings: list[Writing]) -> None:
    if not writings:
        return
    print(f"\n{title}: {len(writings)}")
    print(f"{'tree':>12} {'over plain':>11} {'over first':>11} {'accept':>7} {'drafting':>9}")
    for number, shape in enumerate(trees):
        timings = [writing.drafted[number].timings for writing in writings]
        firsts = [writing.drafted[0].timings.decode_s for writing in writings]
        lengths = [n for writing in writings for n in writing.drafted[number].accept_lengths]
        over_plain = statistics.median(
            writing.plain_s / t.decode_s for writing, t in zip(writings, timings, strict=True)
        )
        over_first = statistics.median(
            first / t.decode_s for first, t in zip(firsts, timings, strict=True)
        )
        share = statistics.median(t.draft_s / t.decode_s for t in timings)
        accept = statistics.mean(lengths)
        print(
            f"{shape!s:>12} {over_plain:>10.2f}x {over_first:>10.2f}x {accept:>7.2f} {share:>9.0%}"
        )


if __name__ == "__main__":
    main()
