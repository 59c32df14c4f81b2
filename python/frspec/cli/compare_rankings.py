"""`frspec compare-rankings`: what two rankings share, and how much text each covers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..console import print_json, printable, write_table
from ..errors import RankingError
from ..evaluation.tasks import TASKS, load_questions
from ..hub import resolve
from ..ranking import Ranking, compare
from ..ranking.command import SIZES
from ..ranking.compare import Coverage, Overlap, Text
from ..ranking.corpus import check_sources, name_of, parse_source, read_chunks
from ..ranking.count import count_texts
from ..tokenizer import Tokenizer

_EPILOG = """\
examples:
  frspec compare-rankings sharegpt.safetensors code.safetensors
  frspec compare-rankings sharegpt.safetensors own.safetensors --tokenizer ./model \\
      --input held-out.jsonl --spec-bench question.jsonl
  frspec compare-rankings sharegpt.safetensors own.safetensors --tokenizer ./model \\
      --input results/results.jsonl --field text --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec compare-rankings`."""
    parser.description = (
        "Compares two rankings of one tokenizer: the tokens that their sub-vocabularies share, and"
        " the share of a text's tokens that each holds. A drafter cannot propose what its"
        " sub-vocabulary lacks, so coverage of text like the one to be written bounds what a size"
        " costs. Each ranking's own corpus is covered too, but a ranking always flatters its own:"
        " give --input that neither was made of."
    )
    parser.epilog = _EPILOG
    parser.add_argument("first", metavar="A", help="ranking, made by `frspec rank-tokens`")
    parser.add_argument("second", metavar="B", help="another one, of the same tokenizer")
    parser.add_argument(
        "--vocab-sizes",
        nargs="+",
        type=int,
        metavar="N",
        help="sizes of sub-vocabularies (default: 8192 16384 32768 65536, as far as both go)",
    )
    group = parser.add_argument_group("held-out text")
    group.add_argument(
        "--tokenizer",
        metavar="DIR|HUB",
        help="model folder or hub id (owner/name) that the rankings are for; needed to count text",
    )
    group.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="text to cover, in the forms that rank-tokens takes; records with a field `task`,"
        " such as those of `frspec eval`, are shown by task too",
    )
    group.add_argument(
        "--field", help="where a record's text is; a.b for nested ones (default: recognised)"
    )
    group.add_argument(
        "--spec-bench",
        metavar="FILE|HUB",
        help="questions of Spec-Bench, JSON lines: coverage of the questions by the paper's tasks;"
        " on the hub: owner/name:path in the data set",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    first, second = Ranking.load(args.first), Ranking.load(args.second)
    compare.check_pair(first, second)
    sizes = _sizes(args.vocab_sizes, first, second)
    texts = [*compare.own_texts(first, second), *_held_out(args, first)]
    shared = compare.overlaps(first, second, sizes)
    covered = compare.coverages(first, second, texts, sizes)
    if args.json:
        print_json(_as_json(first, second, shared, covered))
    else:
        _write_tables(first, second, shared, covered)
    return 0


def _sizes(wanted: list[int] | None, first: Ranking, second: Ranking) -> list[int]:
    most = min(len(first), len(second))
    if wanted is None:
        # The whole of two rankings is no comparison, but of short ones there is nothing else.
        return [size for size in SIZES if size < first.vocab_size and size <= most] or [most]
    for size in wanted:
        if not 0 < size <= most:
            raise RankingError(
                f"--vocab-sizes: expected sizes in [1, {most}], which both rankings hold, found"
                f" {size}"
            )
    return sorted(set(wanted))


def _held_out(args: argparse.Namespace, ranking: Ranking) -> list[Text]:
    if not args.input and args.spec_bench is None:
        return []
    if args.tokenizer is None:
        raise RankingError("--tokenizer is needed to count the tokens of --input and --spec-bench")
    tokenizer = Tokenizer.load(resolve(args.tokenizer, files="tokenizer"))
    ranking.validate(tokenizer.fingerprint)
    texts = []
    if args.input:
        sources = [parse_source(text) for text in args.input]
        check_sources(sources)
        chunks = read_chunks(sources, args.field)
        name = name_of(sources)
        found, broken = compare.held_out_texts(tokenizer, name, chunks, args.field)
        if broken:
            print(broken, file=sys.stderr)
        if found[0].tokens == 0:
            raise RankingError(f"{sources[0]}: no text to count in the input")
        texts += [found[0], *_in_order_of_tasks(found[1:])]
    if args.spec_bench is not None:
        texts += _spec_bench(tokenizer, args.spec_bench)
    return texts


def _spec_bench(tokenizer: Tokenizer, file: str) -> list[Text]:
    tasks = [task for task in TASKS.values() if task.source == "spec_bench"]
    questions = load_questions(tasks, {"spec_bench": file})
    asked = {task.name: [] for task in tasks}
    for question in questions:
        asked[question.task] += question.turns
    name = Path(file).name
    everything = count_texts(tokenizer, [turn for turns in asked.values() for turn in turns])
    parts = [Text("task", task, count_texts(tokenizer, turns)) for task, turns in asked.items()]
    return [Text("held out", name, everything), *parts]


def _in_order_of_tasks(texts: list[Text]) -> list[Text]:
    order = list(TASKS)
    return sorted(texts, key=lambda t: (order.index(t.name) if t.name in TASKS else 99, t.name))


def _as_json(
    first: Ranking, second: Ranking, shared: list[Overlap], covered: list[Coverage]
) -> dict[str, object]:
    return {
        "rankings": [
            {
                "path": ranking.path,
                "corpus": ranking.corpus,
                "source": ranking.source,
                "tokens_counted": ranking.tokens_counted,
                "token_ids": len(ranking),
            }
            for ranking in (first, second)
        ],
        "overlap": [
            {"vocab_size": each.size, "shared": each.shared, "share": each.share} for each in shared
        ],
        "coverage": [
            {
                "text": each.text.name,
                "kind": each.text.kind,
                "tokens": each.text.tokens,
                "vocab_size": each.size,
                "shares": [each.first, each.second],
            }
            for each in covered
        ],
    }


def _write_tables(
    first: Ranking, second: Ranking, shared: list[Overlap], covered: list[Coverage]
) -> None:
    for letter, ranking in zip("AB", (first, second), strict=True):
        counted = f"{ranking.tokens_counted:,} tokens" if ranking.tokens_counted else "imported"
        print(printable(f"{letter}: {ranking.path}: {ranking.corpus}, {counted}"))
    print()
    rows = [(f"{each.size:,}", f"{each.shared:,}", f"{each.share:.1%}") for each in shared]
    write_table("Tokens in both sub-vocabularies", ["vocab size", "tokens", "share"], rows)
    if not covered:
        return
    print()
    rows, before = [], None
    for each in covered:
        text = each.text
        label = "  " + _label(text.name) if text.kind == "task" else f"{text.name} ({text.kind})"
        named = (label, f"{text.tokens:,}") if text is not before else ("", "")
        before = text
        shares = (f"{share:.2%}" for share in (each.first, each.second))
        rows.append((*named, f"{each.size:,}", *shares, f"{100 * (each.second - each.first):+.2f}"))
    write_table(
        "Share of the tokens of a text that a sub-vocabulary holds",
        ["text", "tokens", "vocab size", "A", "B", "B - A, points"],
        rows,
    )


def _label(task: str) -> str:
    return TASKS[task].label if task in TASKS else task
