"""Trains a drafter for a target that has none: an EAGLE-2 layer or Medusa heads.

    python tools/train_drafter.py answers --model DIR --questions FILE --out answers.jsonl
    python tools/train_drafter.py features --model DIR --data sharegpt.jsonl --tokens 2e6 CACHE
    python tools/train_drafter.py eagle --model DIR --cache CACHE --epochs 4 OUT
    python tools/train_drafter.py medusa --model DIR --cache CACHE --heads 3 --epochs 2 OUT
    python tools/train_drafter.py measure --model DIR --cache CACHE OUT

Every step but measure goes on where it was when an ended command is given again. Needs PyTorch and
transformers: pip install 'frspec[train]'. docs/training.md tells more.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

import frspec
from frspec.console import write_line
from frspec.files import write_whole
from frspec.options import tree
from frspec.tree import default_tree

try:
    import torch
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    sys.exit(f"train_drafter: error: {error.name} is not installed: pip install 'frspec[train]'")

from drafter_training import accept_length, features
from drafter_training.answers import Writing, write_answers
from drafter_training.conversations import Skipped
from drafter_training.tasks import EagleTask, MedusaTask
from drafter_training.training import Settings, Task, train

_CUDA = torch.cuda.is_available()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_answers, _add_features, _add_eagle, _add_medusa, _add_measure):
        command = add(commands)
        command.add_argument("--model", required=True, type=Path, help="folder of the target")
    args = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            args.run(args, progress)
    except (frspec.FrspecError, OSError) as error:
        print(f"train_drafter: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = "" if args.command == "measure" else "; the same command goes on"
        print(f"train_drafter: ended{goes_on}", file=sys.stderr)
        return 130
    return 0


def _add_answers(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("answers", help="write the target's own answers, to train on")
    parser.add_argument("--questions", required=True, type=Path, help="file of conversations")
    parser.add_argument("--out", required=True, type=Path, help="JSON lines")
    parser.add_argument(
        "--limit",
        type=int,
        help="answers at most; eight batches at a time go by length of question",
    )
    parser.add_argument(
        "--max-prompt-tokens", type=int, default=512, help="longer questions are left out"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--batch", type=_positive, default=128, help="answers written at a time (default: 128)"
    )
    _add_strict(parser)
    _add_device(parser)
    parser.set_defaults(run=_answers)
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError(text)
    return value


def _answers(args: argparse.Namespace, progress: Progress) -> None:
    writing = Writing(
        args.max_prompt_tokens, args.max_new_tokens, args.temperature, args.batch, args.device
    )
    skipped = None if args.strict else Skipped()
    write_answers(args.model, args.questions, args.out, writing, args.limit, progress, skipped)
    _tell(skipped, progress)


def _add_features(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("features", help="cache what drafters learn from")
    parser.add_argument("cache", type=Path, help="folder to make or to extend")
    parser.add_argument(
        "--data", required=True, nargs="+", help="JSON lines of conversations, as ShareGPT has them"
    )
    parser.add_argument("--tokens", required=True, type=float, help="how many to cache")
    parser.add_argument(
        "--max-tokens", type=int, default=640, help="of a conversation; what follows is left out"
    )
    parser.add_argument(
        "--min-ascii", type=float, default=0.0, metavar="SHARE",
        help="leave out conversations with a smaller share of ASCII characters",
    )  # fmt: skip
    _add_strict(parser)
    _add_device(parser)
    parser.set_defaults(run=_features)
    return parser


def _features(args: argparse.Namespace, progress: Progress) -> None:
    recipe = features.Recipe(str(args.model), args.data, args.max_tokens, args.min_ascii)
    skipped = None if args.strict else Skipped()
    features.write_cache(args.cache, recipe, int(args.tokens), args.device, progress, skipped)
    _tell(skipped, progress)


def _add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict", action="store_true", help="stop at a line that is no conversation"
    )


def _tell(skipped: Skipped | None, progress: Progress) -> None:
    if skipped is not None and skipped.count:
        write_line(progress.console, str(skipped))


def _add_eagle(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("eagle", help="train an EAGLE-2 layer")
    parser.add_argument(
        "--start-from", type=Path, metavar="DRAFTER", help="go on from this EAGLE layer"
    )
    _add_training(parser, learning_rate=6e-4)
    parser.set_defaults(run=_eagle)
    return parser


def _eagle(args: argparse.Namespace, progress: Progress) -> None:
    start_from = args.start_from
    own = {"start_from": None if start_from is None else str(start_from)}
    _train("eagle", own, lambda *which: EagleTask(args.model, *which, start_from), args, progress)


def _add_medusa(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("medusa", help="train Medusa heads")
    parser.add_argument("--heads", type=int, default=4, help="tokens ahead (default: 4)")
    _add_training(parser, learning_rate=1e-3)
    parser.set_defaults(run=_medusa)
    return parser


def _medusa(args: argparse.Namespace, progress: Progress) -> None:
    own = {"heads": args.heads}
    _train("medusa", own, lambda *which: MedusaTask(args.model, *which, args.heads), args, progress)


def _train(
    kind: str,
    own: dict[str, Any],
    make_task: Callable[[features.Cache, Settings], Task],
    args: argparse.Namespace,
    progress: Progress,
) -> None:
    """own: the settings of this kind alone, for the report."""
    settings, cache = _settings(args), features.Cache(args.cache)
    made_of = json.loads((args.cache / "cache.json").read_text(encoding="utf-8"))["recipe"]
    recipe = {"drafter": kind, "cache": made_of, "cached_tokens": cache.tokens} | own
    held_out = features.Cache(args.cache, held_out=True)
    train(make_task(cache, settings), cache, held_out, settings, recipe, args.out, progress)


def _add_training(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    parser.add_argument("out", type=Path, help="folder of the drafter")
    parser.add_argument("--cache", required=True, type=Path, help="folder of `features`")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument(
        "--minutes", type=float, default=0, help="end after this time, if it comes first"
    )
    parser.add_argument("--batch-tokens", type=int, default=4096, help="with padding")
    parser.add_argument("--learning-rate", type=float, default=learning_rate, help="at its highest")
    parser.add_argument("--frequent", type=int, default=8192, help="tokens that every batch scores")
    parser.add_argument(
        "--sampled", type=int, default=2048, help="tokens that stand for the others in a batch"
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_device(parser)


def _settings(args: argparse.Namespace) -> Settings:
    torch.manual_seed(args.seed)
    return Settings(
        epochs=args.epochs,
        minutes=args.minutes,
        batch_tokens=args.batch_tokens,
        learning_rate=args.learning_rate,
        frequent=args.frequent,
        sampled=args.sampled,
        seed=args.seed,
        device=args.device,
    )


def _add_measure(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser("measure", help="accept length on held-out questions, by frspec")
    parser.add_argument("drafter", type=Path, help="folder of the drafter")
    parser.add_argument("--cache", required=True, type=Path, help="folder of `features`")
    parser.add_argument("--questions", type=int, default=40, help="at most")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--tree", type=tree, metavar="DEPTHxTOPKxTOKENS[@P]", help="of the drafts")
    parser.add_argument("--ranking", type=Path, help="ranking file, for --vocab-size")
    parser.add_argument("--vocab-size", type=int, help="tokens that the drafter scores")
    parser.set_defaults(run=_measure)
    return parser


def _measure(args: argparse.Namespace, progress: Progress) -> None:
    drafting = {
        "tree": args.tree,
        "ranking": args.ranking,
        "vocab_size": args.vocab_size,
    }
    found = accept_length.measure(
        args.model, args.drafter, args.cache, drafting, args.questions, args.max_new_tokens,
        args.temperature, progress,
    )  # fmt: skip
    path = args.drafter / "training.json"
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        name = str(args.tree or default_tree())
        name += f", {args.vocab_size} tokens" if args.vocab_size else ""
        report.setdefault("held_out_accept_length", {})[name] = found
        write_whole(path, (json.dumps(report, indent=1) + "\n").encode())
    print(
        f"accept length {found['accept_length']:.3f} in {found['rounds']} rounds of"
        f" {found['questions']} held-out questions"
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if _CUDA else "cpu", help="of PyTorch: cpu, cuda, cuda:N"
    )


if __name__ == "__main__":
    sys.exit(main())
