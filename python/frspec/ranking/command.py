"""The command `frspec rank-tokens`: counts a corpus, or imports a published list of ids."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ..errors import RankingError
from ..hub import resolve
from ..tokenizer import Tokenizer
from .corpus import Broken, check_inputs, read_corpus
from .count import Count, count_tokens
from .file import Ranking

SIZES = (8192, 16384, 32768, 65536)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec rank-tokens`."""
    parser.description = (
        "Ranks the tokens of a vocabulary by how often they occur in a corpus, for drafting over"
        " the most frequent ones. One file serves every --vocab-size."
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR|HUB",
        help="model folder or hub id (owner/name) whose tokenizer and config are used",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="corpus: .jsonl/.json (one object a line: ShareGPT conversations, messages or text),"
        " .parquet (the same as columns), any other name is plain text",
    )
    source.add_argument(
        "--import-pt",
        type=Path,
        metavar="FILE",
        help="take the ids of a published FR-Spec list (freq_32768.pt) instead of counting",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="ranking to write")
    parser.add_argument(
        "--field", help="where a record's text is; a.b for nested ones (default: recognised)"
    )
    parser.add_argument("--corpus", metavar="NAME", help="name of the corpus, kept in the file")
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="stop after N tokens (default: all)"
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first broken line instead of skipping"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    if args.max_tokens is not None and args.max_tokens < 1:
        raise RankingError(f"--max-tokens: expected at least 1, found {args.max_tokens}")
    # Hours of counting are not lost to a misspelt folder.
    if not args.out.parent.is_dir():
        raise RankingError(f"--out {args.out}: no such folder {args.out.parent}")
    if args.out.is_dir():
        raise RankingError(f"--out {args.out}: expected a file, found a folder")
    tokenizer = Tokenizer.load(resolve(args.tokenizer, files="tokenizer"))
    if args.import_pt is not None:
        ranking = import_ids(args.import_pt, tokenizer, args.corpus or args.import_pt.name)
    else:
        corpus = args.corpus or ", ".join(path.name for path in args.input)
        ranking = _count(args, tokenizer, corpus)
    ranking.save(args.out)
    _print_summary(Console(), ranking, args.out)
    return 0


def import_ids(path: Path, tokenizer: Tokenizer, corpus: str) -> Ranking:
    """A ranking from a PyTorch file that holds token ids by frequency (a list or a tensor)."""
    from ..convert.tensors import LazyTensor
    from ..convert.torch_file import load_torch_file

    if not path.is_file():
        raise RankingError(f"{path}: no such input file")
    value = load_torch_file(path)
    try:
        array = value.numpy() if isinstance(value, LazyTensor) else np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        found = f"{type(value).__name__} ({array.dtype} {list(array.shape)})"
        raise RankingError(f"{path}: expected a list of token ids, found {found}")
    outside = array[(array < 0) | (array >= tokenizer.vocab_size)]
    if outside.size:
        raise RankingError(
            f"{path}: expected ids in [0, {tokenizer.vocab_size}) of the tokenizer,"
            f" found {outside[0]}"
        )
    ranking = Ranking(
        token_ids=array.astype(np.int32),
        counts=np.zeros(array.size, dtype=np.int64),
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus=corpus,
        tokens_counted=0,
        special_ids=tokenizer.ending_ids,
        vocab_size=tokenizer.vocab_size,
        source="imported",
        path=str(path),
    )
    ranking.validate()
    return ranking


def _count(args: argparse.Namespace, tokenizer: Tokenizer, corpus: str) -> Ranking:
    broken = Broken(strict=args.strict)
    total_bytes = check_inputs(args.input)  # before the bar: a missing file is one line
    console = Console(stderr=True)
    with Progress(
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,  # an unfinished bar would stand before an error's line
    ) as progress:
        task = progress.add_task("counting", total=total_bytes, rate="")

        def show(count: Count) -> None:
            rate = f"{_short(count.tokens)} tokens, {_short(_rate(count))}/s"
            progress.update(task, completed=count.bytes_read, rate=rate)

        pieces = read_corpus(args.input, args.field, broken)
        count = count_tokens(tokenizer, pieces, args.max_tokens, show)
    if broken.records:
        console.print(
            f"skipped {broken.records} broken records, the first at {broken.first}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if count.tokens == 0:
        raise RankingError(f"{args.input[0]}: no text to count in the input")
    console.print(
        f"{count.tokens:,} tokens in {count.total_s:.1f} s: {_short(_rate(count))} tokens/s,"
        f" {count.tokenizer_s / count.total_s:.0%} of the time in the tokenizer",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return Ranking.from_counts(
        count.counts,
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus=corpus,
        special_ids=tokenizer.ending_ids,
    )


def _print_summary(console: Console, ranking: Ranking, path: Path) -> None:
    title = f"{path}: {len(ranking):,} of {ranking.vocab_size:,} tokens, {ranking.corpus}"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    if ranking.tokens_counted == 0:
        console.print("imported: the order is kept, there are no counts to compute coverage from")
        return
    table = Table()
    table.add_column("vocab size", justify="right")
    table.add_column("share of vocabulary", justify="right")
    table.add_column("coverage", justify="right")
    for size in [*(s for s in SIZES if s < len(ranking)), len(ranking)]:
        share = size / ranking.vocab_size
        table.add_row(f"{size:,}", f"{share:.1%}", f"{ranking.coverage(size):.2%}")
    seen = int(np.count_nonzero(ranking.counts))
    table.caption = f"{seen:,} tokens occur in the corpus"
    console.print(table)


def _rate(count: Count) -> float:
    return count.tokens / max(count.total_s, 1e-9)


def _short(value: float) -> str:
    """Three digits and a unit: 27.7M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
