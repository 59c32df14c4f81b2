"""The command `frspec convert`."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from frspec.console import write_line
from frspec.convert.tensors import WEIGHT_DTYPES
from frspec.files import ended_by_signals, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec convert`."""
    parser.description = (
        "Turns weights from anywhere into a folder that --model or --drafter loads: GGUF files of"
        " llama and qwen2 architecture, PyTorch .bin/.pt files, EAGLE and Medusa checkpoints."
        " Hugging Face folders with safetensors load as they are."
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="file, folder or hub id (owner/name; not of GGUF files) to convert",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty but with --force")
    parser.add_argument(
        "--target",
        metavar="DIR|HUB",
        help="for an EAGLE or Medusa checkpoint: the model it drafts for; an EAGLE drafter's own"
        " embedding is dropped when it equals the target's; needed for the Medusa heads of a whole"
        " model",
    )
    parser.add_argument(
        "--dtype",
        choices=list(WEIGHT_DTYPES),
        help="dtype of the weights (default: the checkpoint's own, bf16 for a quantised one)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace the model folder that is at OUT"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    from frspec.convert import convert

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = progress.add_task("converting", total=None, start=False)

    def show(done: int, total: int, _: str) -> None:
        if not progress.tasks[task].started:
            progress.start_task(task)
        progress.update(task, completed=done, total=total)

    def say(text: str) -> None:
        write_line(console, text)

    with progress, ended_by_signals():
        folder = convert(
            args.source,
            args.out,
            target=args.target,
            dtype=args.dtype,
            progress=show,
            note=say,
            force=args.force,
        )
    if str(folder) == str(user_path(args.out)):
        say(f"{args.source} converted: load it from {folder}")
    return 0
