"""Measures tree shapes: how much faster than plain decoding each one writes the same prompts.

For every prompt, plain decoding and every tree run one after the other; the speed-up of a tree is
the median over the prompts of plain seconds over its seconds, so that a noisy machine disturbs both
sides alike.

    python tools/sweep_trees.py --model DIR --drafter DIR --ranking FILE --vocab-size 8192 \\
        --prompts spec_bench.jsonl --trees 1x3x4 2x4x8 3x4x12
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import track

import frspec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--ranking")
    parser.add_argument("--vocab-size", default="full", help="columns of the draft head, or full")
    parser.add_argument("--prompts", required=True, type=Path, help="Spec-Bench JSON lines")
    parser.add_argument("--limit", type=int, default=8, help="prompts, spread over the file")
    parser.add_argument("--trees", nargs="+", required=True, metavar="DEPTHxTOPKxTOKENS[@P]")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["turns"][0] for line in lines]
    questions = [questions[i * len(questions) // args.limit] for i in range(args.limit)]
    generators = {
        tree: frspec.Generator(
            args.model,
            args.drafter,
            args.ranking,
            vocab_size=args.vocab_size if args.vocab_size == "full" else int(args.vocab_size),
            max_context=2048,
            threads=args.threads,
            tree=frspec.Tree.parse(tree),
        )
        for tree in args.trees
    }
    speedups: dict[str, list[float]] = {tree: [] for tree in args.trees}
    emitted = dict.fromkeys(args.trees, 0)
    rounds = dict.fromkeys(args.trees, 0)
    draft_share: dict[str, list[float]] = {tree: [] for tree in args.trees}

    def write(generator: frspec.Generator, question: str, method: str) -> frspec.Result:
        return generator.generate(
            [{"role": "user", "content": question}],
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=1,
            method=method,
            ignore_eos=True,
        )

    for question in track(questions, console=Console(stderr=True), transient=True):
        for tree, generator in generators.items():
            plain = write(generator, question, "plain")
            drafted = write(generator, question, "eagle2")
            if drafted.token_ids != plain.token_ids:
                sys.exit(f"{tree}: the text differs from plain decoding's")
            speedups[tree].append(plain.timings.decode_s / drafted.timings.decode_s)
            draft_share[tree].append(drafted.timings.draft_s / drafted.timings.decode_s)
            emitted[tree] += sum(drafted.accept_lengths)
            rounds[tree] += len(drafted.accept_lengths)

    print(f"{'tree':>10} {'speed-up':>9} {'accept':>7} {'drafting':>9}")
    for tree in args.trees:
        accept = emitted[tree] / rounds[tree]
        share = statistics.median(draft_share[tree])
        print(f"{tree:>10} {statistics.median(speedups[tree]):>9.2f} {accept:>7.2f} {share:>9.0%}")


if __name__ == "__main__":
    main()
