"""Figures in the manner of the paper's 1, 6 and 7, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .methods import PLAIN, Configuration, short_size
from .report import write_file
from .statistics import Run

# Colours that stay apart for the colour-blind (Okabe and Ito); plain decoding is grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D1F")
_GREY = "#999999"
_PARTS = {"draft_s": "drafting", "verify_s": "verification", "rest_s": "rest"}


def write_plots(folder: Path, runs: Sequence[Run]) -> dict[str, str]:
    """Writes what there are results for; file name to what it shows."""
    pyplot = import_pyplot()
    written: dict[str, str] = {}

    def write(name: str, title: str, draw: Callable[[Any], Any]) -> None:
        with pyplot.rc_context({"font.size": 10, "axes.spines.top": False,
                                "axes.spines.right": False}):  # fmt: skip
            figure = draw(pyplot)
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
        pyplot.close(figure)
        write_file(folder / name, data.getvalue())
        written[name] = title

    for index, run in enumerate(runs, 1):
        if not run.tasks or not run.methods:
            continue
        suffix = f"-{index}" if len(runs) > 1 else ""
        of = f" ({run.name})" if len(runs) > 1 else ""
        write(f"time{suffix}.png", f"Time of a token{of}", lambda p, r=run: _draw_time(p, r))
        if run.has_plain() and len(run.methods) > 1:
            title = f"Speed-up over plain decoding{of}"
            write(f"speed-up{suffix}.png", title, lambda p, r=run: _draw_speed_up(p, r))
    lines = _accept_lines(runs)
    if any(len(points) > 1 for points in lines.values()):
        title = "Accept length over the drafter's vocabulary"
        write("accept-length.png", title, lambda p: _draw_accept_length(p, lines, runs))
    return written


def _draw_time(pyplot, run: Run):
    """Stacked bars: milliseconds of a generated token, by what they went into."""
    methods = run.methods[::-1]  # the first one on top
    figure, axes = pyplot.subplots(figsize=(7.5, 1.3 + 0.5 * len(methods)))
    left = [0.0] * len(methods)
    for (name, label), colour in zip(_PARTS.items(), _COLOURS, strict=False):
        widths = [run.time_shares(method)[name] * 1e3 for method in methods]
        axes.barh(range(len(methods)), widths, left=left, color=colour, label=label, height=0.6)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for row, (method, total) in enumerate(zip(methods, left, strict=True)):
        drafting = run.time_shares(method)["draft_s"] * 1e3 / total if total else 0.0
        note = f" {total:.2f} ms" + (f", {drafting:.0%} drafting" if method.method != PLAIN else "")
        axes.text(total, row, note, va="center", fontsize=9)
    axes.set_yticks(range(len(methods)), [method.label for method in methods])
    axes.set_xlim(0, max(left, default=1.0) * 1.35 or 1.0)
    axes.set_xlabel("milliseconds per generated token, prompt not included")
    axes.set_title("Time of a token", loc="left")
    _legend(figure, axes, len(_PARTS))
    return figure


def _draw_speed_up(pyplot, run: Run):
    """Grouped bars: a group per task and one for the average, a bar per method."""
    methods = run.methods
    tasks = [task.name for task in run.tasks]
    labels = [task.label for task in run.tasks] + ["Average"]
    width = 0.84 / len(methods)
    figure, axes = pyplot.subplots(figsize=(max(6.5, 1.6 + 0.34 * len(labels) * len(methods)), 3.8))
    for index, (method, colour) in enumerate(zip(methods, _method_colours(methods), strict=True)):
        values = [run.speed_up(method, task) for task in tasks]
        values.append(run.average(run.speed_up, method))
        places = [place - 0.42 + (index + 0.5) * width for place in range(len(labels))]
        heights = [value or 0.0 for value in values]
        bars = axes.bar(places, heights, width * 0.94, color=colour, label=method.label)
        texts = ["" if value is None else f"{value:.2f}" for value in values]
        axes.bar_label(bars, texts, fontsize=7.5, padding=2, rotation=90)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(x=0.01, y=0.16)
    axes.set_ylabel("tokens/s over plain decoding's")
    axes.set_title("Speed-up over plain decoding", loc="left")
    _legend(figure, axes, len(methods))
    return figure


def _accept_lines(runs: Sequence[Run]) -> dict[str, list[tuple[int, float]]]:
    """Line to its points (vocabulary size, accept length), from small to large.

    One run: a line per task and method, and their average. Several: the averages alone.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        full_size = run.header.get("vocab_size") or 0
        for method in [method for method in run.methods if method.method != PLAIN]:
            size = method.vocab_size or full_size
            drafters = {m.method for m in run.methods if m.method != PLAIN}
            drafter = f"{Configuration(method.method).label}, " if len(drafters) > 1 else ""
            values = {"average": run.average(run.accept_length, method)}
            if len(runs) == 1:
                values |= {t.label: run.accept_length(method, t.name) for t in run.tasks}
            for name, value in values.items():
                line = f"{drafter}{name if len(runs) == 1 else run.name}"
                if value is not None:
                    lines.setdefault(line, []).append((size, value))
    return {line: sorted(points) for line, points in lines.items()}


def _draw_accept_length(pyplot, lines: Mapping[str, list[tuple[int, float]]], runs: Sequence[Run]):
    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    thin = 0
    for line, points in lines.items():
        sizes, values = zip(*points, strict=True)
        if line.endswith("average"):
            axes.plot(sizes, values, "o-", color="black", linewidth=2.4, label=line, zorder=3)
        else:
            style = "os^Dv<>p"[thin % 8] + ("-" if thin < len(_COLOURS) else "--")
            colour = _COLOURS[thin % len(_COLOURS)]
            axes.plot(sizes, values, style, color=colour, linewidth=1.3, markersize=4, label=line)
            thin += 1
    full = {run.header.get("vocab_size") for run in runs}
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    names = [f"all\n({size:,})" if size in full else short_size(size) for size in sizes]
    axes.set_xticks(sizes, names)
    axes.minorticks_off()
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_xlabel("tokens that the drafter scores")
    axes.set_ylabel("accept length (tokens per round)")
    axes.set_title("Accept length over the drafter's vocabulary", loc="left")
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _method_colours(methods: Sequence[Configuration]) -> list[str]:
    drafting = iter(_COLOURS * (1 + len(methods) // len(_COLOURS)))
    return [_GREY if method.method == PLAIN else next(drafting) for method in methods]


def _legend(figure, axes, columns: int) -> None:
    """Below the axes, where it covers nothing."""
    axes.legend(
        frameon=False,
        fontsize=9,
        ncols=min(columns, 5),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.42 / figure.get_figheight() * 1.5),
    )


def import_pyplot():
    """matplotlib.pyplot without windows; EvaluationError names the extra that brings it."""
    try:
        import matplotlib
    except ImportError:
        raise EvaluationError(
            "plots need matplotlib, which is not installed: pip install 'frspec[eval]', or"
            " --no-plots"
        ) from None
    matplotlib.use("Agg")  # no window, whatever the user's settings are
    from matplotlib import pyplot

    return pyplot
