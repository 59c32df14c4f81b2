"""Writing for people and for pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import rich.box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # the generator imports modules whose commands write with these functions
    from .generator import Result, TextStream

# A terminal obeys control characters, and a model may write any: all but tab and newline.
_CONTROLS = {
    code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"
}


def write_text(piece: str) -> None:
    """Writes a piece of generated text to stdout at once."""
    if sys.stdout.isatty():
        piece = piece.translate(_CONTROLS)
    sys.stdout.write(piece)
    sys.stdout.flush()


def printable(text: str) -> str:
    """`text` for a line on a terminal: control characters in it do nothing."""
    return text.replace("\t", " ").replace("\n", " ").translate(_CONTROLS)


def write_stream(stream: TextStream) -> bool:
    """Writes a stream to stdout as it is made; False when Ctrl-C ended it, which closes it.

    What was made until then stands on stdout, once.
    """
    written = 0
    try:
        for piece in stream:
            # Counted first: a write that is interrupted keeps its text for the next flush.
            written += len(piece)
            write_text(piece)
    except KeyboardInterrupt:
        stream.close()
        write_text(stream.result.text[written:])
        return False
    return True


def print_json(value: Any) -> None:
    """One JSON object in one line on stdout."""
    print(json.dumps(value))


def write_line(console: Console, text: str) -> None:
    """One line as it is, however long, without markup or colours."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def write_summary(result: Result) -> None:
    """One line about a finished text on stderr."""
    count = len(result.token_ids)
    parts = [f"{count} token{'' if count == 1 else 's'}"]
    if result.timings.tokens_per_s > 0:
        parts.append(f"{result.timings.tokens_per_s:.1f} tokens/s")
    if result.method != "plain" and result.accept_lengths:
        parts.append(f"accept length {accept_length(result.accept_lengths):.2f}")
    parts += [f"{result.method} on {result.device}", result.finish_reason]
    Console(stderr=True).print(", ".join(parts), style="dim", highlight=False, soft_wrap=True)


def accept_length(accept_lengths: Sequence[int]) -> float:
    """Mean number of tokens that a round gave; 0 without a round."""
    return sum(accept_lengths) / len(accept_lengths) if accept_lengths else 0.0


_LEAST_WORDS = 12  # columns of a terminal that fold words readably


def write_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout: with lines in a terminal that has room for it, else aligned plain text.

    The first column holds words; the others hold figures if they have a heading. Where a terminal
    is narrow, headings and words fold; figures stay whole.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    cells = [max((cell_len(row[i]) for row in rows), default=0) for i in range(len(columns))]
    natural = [max(cell_len(name), cells[i]) for i, name in enumerate(columns)]
    folded = [max([cells[i], *map(cell_len, name.split())]) for i, name in enumerate(columns)]
    console = Console()
    room = console.width - (1 + 3 * len(columns))  # inside of the lines
    whole = sum(natural) <= room
    words = min(natural[0], room - sum(folded[1:]))
    figures = any(columns)  # without headings there are only words, all of which may fold
    boxed = sys.stdout.isatty() and (whole or not figures or words >= min(natural[0], _LEAST_WORDS))
    if not boxed:  # a row is a line, however long
        console = Console(width=sum(natural) + 3 * len(columns), color_system=None)
    table = Table(box=rich.box.ROUNDED if boxed else None, show_header=figures, pad_edge=boxed)
    for index, name in enumerate(columns):
        width = None
        if boxed and figures and not whole:
            width = folded[index] if index else words
        justify = "right" if index and name else "left"
        table.add_column(name, justify=justify, overflow="fold", width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    with console.capture() as capture:
        if title:
            write_line(console, title)
        console.print(table)
    for line in capture.get().splitlines():
        print(line.rstrip())


def format_bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
