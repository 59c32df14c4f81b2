"""The command `frspec rank-tokens`: counts a corpus, merges rankings, or imports a list of ids."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from rich.box import HEAVY_HEAD
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

from ..console import write_line
from ..errors import RankingError
from ..files import is_utf8
from ..hub import resolve
from ..tokenizer import Tokenizer
from .checkpoint import RunCheckpoint
from .chunk import Chunk
from .corpus import check_sources, describe_source, name_of, parse_source, read_chunks
from .count import ChunkCount, Tally, add_up, count_chunk
from .file import Ranking
from .imported import import_ids
from .merge import merge_rankings
from .workers import count_in_processes

SIZES = (8192, 16384, 32768, 65536)

_EPILOG = """\
examples:
  frspec rank-tokens --tokenizer ./model --input corpus.jsonl.zst --field text \\
      --processes 8 --checkpoint corpus.checkpoint --out ranking.safetensors
  frspec rank-tokens --tokenizer ./model --input hf://HuggingFaceFW/fineweb:sample-10BT \\
      --max-tokens 1000000000 --out ranking.safetensors
  frspec rank-tokens --tokenizer ./model --input results/results.jsonl --field text \\
      --out own.safetensors
  frspec rank-tokens --merge part-1.safetensors part-2.safetensors --out ranking.safetensors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec rank-tokens`."""
    parser.description = (
        "Ranks the tokens of a vocabulary by how often they occur in a corpus, for drafting over"
        " the most frequent ones. One file serves every --vocab-size."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "--tokenizer",
        metavar="DIR|HUB",
        help="model folder or hub id (owner/name) whose tokenizer and config are used; needed but"
        " for --merge",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input",
        nargs="+",
        metavar="INPUT",
        help="corpus, by name: .jsonl/.json (one object a line, or .json one array: ShareGPT"
        " conversations, messages or text), .parquet (the same as columns), any other is plain"
        " text; .gz or .zst behind it is decompressed. hf://owner/name[@revision][:config][/split]"
        " streams a data set of the hub (split train by default)",
    )
    source.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="add up rankings of the parts of a corpus, made on several machines, say: the result"
        " is the ranking of the whole",
    )
    source.add_argument(
        "--import-pt",
        type=Path,
        metavar="FILE",
        help="take the ids of a published FR-Spec list (freq_32768.pt) instead of counting",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="ranking to write, or to replace"
    )
    parser.add_argument(
        "--corpus", metavar="NAME", help="name of the corpus, kept in the file (default: inputs)"
    )
    group = parser.add_argument_group("counting")
    group.add_argument(
        "--field", help="where a record's text is; a.b for nested ones (default: recognised)"
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="stop after the first N tokens, always the same ones (default: all)",
    )
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="share the work among N processes, one core each; the counts are the same (default: 1"
        " process with the tokenizer's own threads)",
    )
    group.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep here what was counted, twice a minute: the same command goes on from it after"
        " an interruption. Removed when the ranking is written",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first broken record or archive instead of counting what can be read",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    _check(args)
    checkpoint = None
    if args.merge is not None:
        ranking = merge_rankings(args.merge, args.corpus)
        if args.tokenizer is not None:
            ranking.validate(Tokenizer.load(resolve(args.tokenizer, files="tokenizer")).fingerprint)
    else:
        folder = resolve(args.tokenizer, files="tokenizer")
        tokenizer = Tokenizer.load(folder)
        if args.import_pt is not None:
            ranking = import_ids(args.import_pt, tokenizer, args.corpus or args.import_pt.name)
        else:
            ranking, checkpoint = _count(args, folder, tokenizer)
    ranking.save(args.out)
    if checkpoint is not None:
        checkpoint.remove()
    _print_summary(Console(), ranking, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Hours of counting are not lost to a misspelt folder."""
    for option in ("max_tokens", "processes"):
        value = getattr(args, option)
        if value is not None and value < 1:
            name = option.replace("_", "-")
            raise RankingError(f"--{name}: expected at least 1, found {value}")
    if args.input is None:
        for option in ("field", "max_tokens", "processes", "checkpoint", "strict"):
            if getattr(args, option):
                raise RankingError(f"--{option.replace('_', '-')} is for --input")
    if args.tokenizer is None and args.merge is None:
        raise RankingError("--tokenizer is needed (but for --merge)")
    _check_names(args)
    _check_places(args)
    if args.checkpoint is not None and args.checkpoint.resolve() == args.out.resolve():
        raise RankingError(f"--checkpoint {args.checkpoint}: expected another file than --out")


def _check_names(args: argparse.Namespace) -> None:
    """The file keeps names in UTF-8."""
    paths = [args.out, args.import_pt or "", *(args.input or []), *(args.merge or [])]
    for name in (args.corpus or "", *map(str, paths)):
        if not is_utf8(name):
            raise RankingError(f"expected names in UTF-8, found {name!r:.80}")


def _check_places(args: argparse.Namespace) -> None:
    """What will be written can be, and replaces nothing but a ranking."""
    for option in ("out", "checkpoint"):
        path = getattr(args, option)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise RankingError(f"--{option} {path}: no such folder {path.parent}")
        if path.is_dir():
            raise RankingError(f"--{option} {path}: expected a file, found a folder")
        folder = Path(os.path.realpath(path)).parent  # of a link the target is replaced
        if not os.access(folder, os.W_OK):
            raise RankingError(f"--{option} {path}: cannot write into {folder}")
    if args.out.is_file() and args.out.stat().st_size > 0 and not _is_ranking(args.out):
        raise RankingError(
            f"--out {args.out}: expected a new file or a ranking to replace, found another file"
        )
    for source in args.merge or []:
        if source.exists() and args.out.exists() and source.samefile(args.out):
            raise RankingError(f"--out {args.out}: expected another file than those to merge")


def _is_ranking(path: Path) -> bool:
    try:
        Ranking.load(path)
    except RankingError:
        return False
    return True


def _count(
    args: argparse.Namespace, folder: Path, tokenizer: Tokenizer
) -> tuple[Ranking, RunCheckpoint | None]:
    sources = [parse_source(text) for text in args.input]
    total_bytes = check_sources(sources)  # before the bar: a missing file is one line
    console = Console(stderr=True)
    checkpoint = None
    start = Tally.empty(tokenizer.vocab_size)
    if args.checkpoint is not None:
        configuration = _configuration(args, tokenizer, sources)
        checkpoint = RunCheckpoint(args.checkpoint, configuration)
        start = checkpoint.load(tokenizer.vocab_size)
    if start.tokens:
        write_line(console, f"{args.checkpoint}: going on behind {start.tokens:,} tokens")

    begin = time.perf_counter()
    tally = start
    chunks = read_chunks(sources, args.field, start.position)
    try:
        with (
            _progress(console) as progress,
            closing(_counted(args, chunks, folder, tokenizer, console)) as counted,
        ):
            task = progress.add_task("counting", total=total_bytes, rate="")
            for tally in add_up(
                counted,
                start,
                strict=args.strict,
                max_tokens=args.max_tokens,
                recount=lambda chunk, limit: count_chunk(tokenizer, chunk, args.field, limit),
            ):
                rate = (tally.tokens - start.tokens) / (time.perf_counter() - begin)
                told = f"{_short(tally.tokens)} tokens, {_short(rate)}/s"
                progress.update(task, completed=tally.bytes_read, rate=told)
                if checkpoint is not None:
                    checkpoint.save_when_due(tally)
    except BaseException:
        if checkpoint is not None and tally.tokens:
            checkpoint.save(tally)
            write_line(
                console,
                f"{args.checkpoint}: keeps {tally.tokens:,} tokens; the same command goes on"
                " behind them",
            )
        raise
    seconds = time.perf_counter() - begin
    if tally.broken:
        write_line(console, str(tally.broken))
    if tally.tokens == 0:
        raise RankingError(f"{sources[0]}: no text to count in the input")
    counted_now = tally.tokens - start.tokens
    share = tally.tokenizer_s / (seconds * (args.processes or 1))
    reached = tally.tokens == args.max_tokens
    write_line(
        console,
        f"{counted_now:,} tokens in {seconds:.1f} s: {_short(counted_now / seconds)} tokens/s,"
        f" {share:.0%} of the time in the tokenizer"
        + (f"; stopped at --max-tokens {args.max_tokens:,}" if reached else ""),
    )
    ranking = Ranking.from_counts(
        tally.counts,
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus=args.corpus or name_of(sources),
        special_ids=tokenizer.ending_ids,
    )
    return ranking, checkpoint


def _counted(
    args: argparse.Namespace,
    chunks: Iterator[Chunk],
    folder: Path,
    tokenizer: Tokenizer,
    console: Console,
) -> Iterator[tuple[Chunk, ChunkCount]]:
    if (args.processes or 1) > 1:
        yield from count_in_processes(
            chunks, folder, args.field, args.processes, lambda line: write_line(console, line)
        )
    else:
        for chunk in chunks:
            yield chunk, count_chunk(tokenizer, chunk, args.field)


def _configuration(args: argparse.Namespace, tokenizer: Tokenizer, sources) -> dict[str, object]:
    """What the counts depend on, by the names that a person knows."""
    inputs = {f"input {number}": describe_source(s) for number, s in enumerate(sources, 1)}
    return {
        "tokenizer fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.vocab_size,
        "number of inputs": len(sources),
        **inputs,
        "--field": args.field,
        "--max-tokens": args.max_tokens,
        "--strict": args.strict,
    }


def _print_summary(console: Console, ranking: Ranking, path: Path) -> None:
    title = f"{path}: {len(ranking):,} of {ranking.vocab_size:,} tokens, {ranking.corpus}"
    write_line(console, title)
    if ranking.tokens_counted == 0:
        console.print("imported: the order is kept, there are no counts to compute coverage from")
        return
    # Away from a terminal nothing draws lines.
    table = Table(box=HEAVY_HEAD if console.is_terminal else None)
    table.add_column("vocab size", justify="right")
    table.add_column("share of vocabulary", justify="right")
    table.add_column("coverage", justify="right")
    for size in [*(s for s in SIZES if s < len(ranking)), len(ranking)]:
        share = size / ranking.vocab_size
        table.add_row(f"{size:,}", f"{share:.1%}", f"{ranking.coverage(size):.2%}")
    seen = int(np.count_nonzero(ranking.counts))
    table.caption = f"{seen:,} tokens occur in the corpus"
    console.print(table)


def _progress(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,  # an unfinished bar would stand before an error's line
    )


def _short(value: float) -> str:
    """Three digits and a unit: 27.7M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
