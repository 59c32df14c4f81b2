"""Compares frspec with llama.cpp and transformers: the same weights, prompts and threads.

    python tools/compare_peers --model DIR --drafter EAGLE --medusa HEADS --ranking FILE \\
        --gguf model.gguf --spec-bench question.jsonl --limit 10 --json results.json

Every question of the seven tasks goes through all runtimes one after the other before the next one
comes, so that a machine that is slow for a while is slow for all; what is compared is the median
over the questions of each runtime's tokens/s over plain frspec's: of all questions, and of each
task's. Needs llama-cpp-python (built for this machine), and torch and transformers; a runtime that
is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from gguf_file import write_bf16
from peers import Frspec, LlamaCpp, Process, Transformers, Written
from rich.console import Console
from rich.progress import track

import frspec
from frspec.errors import RequestError
from frspec.evaluation.methods import short_size
from frspec.evaluation.report import markdown_table
from frspec.evaluation.tasks import TASKS, load_questions
from frspec.evaluation.worker import chat_messages
from frspec.files import write_whole
from frspec.options import tree
from frspec.tokenizer import Tokenizer
from frspec.tree import default_tree

PLAIN = "frspec, plain"
_TASKS = [name for name, task in TASKS.items() if task.source != "gsm8k"]
Prompt = tuple[str, list[int]]  # task, token ids


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--gguf", type=Path, help="the file that the folder was converted from")
    parser.add_argument("--drafter", help="EAGLE drafter")
    parser.add_argument("--medusa", help="Medusa heads")
    parser.add_argument("--ranking", help="ranking file")
    parser.add_argument(
        "--vocab-sizes", nargs="+", type=int, default=[32768, 16384, 8192], help="of EAGLE-2 + FR"
    )
    parser.add_argument(
        "--tree",
        type=tree,
        metavar="DEPTHxTOPKxTOKENS[@P]",
        help="of EAGLE-2 (default: the CPU's)",
    )
    parser.add_argument(
        "--medusa-tree",
        type=tree,
        metavar="DEPTHxTOPKxTOKENS[@P]",
        help="of Medusa (default: the CPU's)",
    )
    parser.add_argument("--medusa-vocab-size", type=int, default=16384, help="of Medusa + FR")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=_TASKS,
        choices=_TASKS,
        metavar="TASK",
        help=f"of {', '.join(_TASKS)} (default: all)",
    )
    parser.add_argument("--spec-bench", required=True, help="question.jsonl of Spec-Bench")
    parser.add_argument("--limit", type=int, default=10, help="questions of each task")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-context", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=frspec._core.usable_threads())
    parser.add_argument("--json", type=Path, help="write the settings and the figures to this file")
    args = parser.parse_args()
    if args.max_new_tokens < 2:  # speeds are those of the tokens behind the first one
        parser.error(f"--max-new-tokens: expected at least 2, found {args.max_new_tokens}")

    try:
        return compare(args)
    except (frspec.FrspecError, RuntimeError, OSError) as error:
        print(f"compare_peers: error: {error}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace) -> int:
    if args.json:  # before an hour of work
        write_whole(args.json, args.json.read_bytes() if args.json.exists() else b"")
    tokenizer = Tokenizer.load(args.model)
    prompts = read_prompts(args, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        runtimes = start(args, Path(scratch))
        found = measure(runtimes, prompts, args.max_new_tokens)
        for runtime in runtimes.values():
            runtime.close()
    report = summarize(found, [task for task, _ in prompts], tokenizer.ending_ids)
    print_tables(report, len(prompts))
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        text = json.dumps({"settings": settings, "runtimes": report}, indent=1) + "\n"
        write_whole(args.json, text.encode())
    return 0


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer) -> list[Prompt]:
    """Each question's task and the token ids of its first turn; those beyond the context are left
    out."""
    tasks = [TASKS[name] for name in args.tasks]
    prompts: list[Prompt] = []
    left_out = 0
    for question in load_questions(tasks, {"spec_bench": args.spec_bench}, args.limit):
        messages = chat_messages(question, question.turns[:1])
        ids = tokenizer.encode(tokenizer.chat(messages), add_special_tokens=False)
        if len(ids) + args.max_new_tokens <= args.max_context:
            prompts.append((question.task, ids))
        else:
            left_out += 1
    if left_out:
        print(f"{left_out} questions do not fit into --max-context: left out", file=sys.stderr)
    if not prompts:
        raise RequestError(f"--max-context {args.max_context}: no question fits into it")
    return prompts


def start(args: argparse.Namespace, scratch: Path) -> dict[str, Process]:
    """A process for each runtime, loaded and warmed up; plain frspec is the first."""
    own: dict[str, Any] = {
        "model": args.model,
        "threads": args.threads,
        "max_context": args.max_context,
        "device": "cpu",
    }
    wanted: list[tuple[str, Any, dict[str, Any]]] = [(PLAIN, Frspec, own)]
    for label, drafter, shape, sizes in (
        ("EAGLE-2", args.drafter, args.tree, args.vocab_sizes),
        ("Medusa", args.medusa, args.medusa_tree, [args.medusa_vocab_size]),
    ):
        if drafter is None:
            continue
        options = own | {"drafter": drafter, "tree": shape or default_tree("cpu")}
        wanted.append((f"frspec, {label}", Frspec, options))
        for size in sizes if args.ranking else []:
            ranked = options | {"ranking": args.ranking, "vocab_size": size}
            wanted.append((f"frspec, {label} + FR {short_size(size)}", Frspec, ranked))
    if args.gguf is not None and installed("llama_cpp"):
        same = scratch / "bf16.gguf"
        write_bf16(args.gguf, same)
        for name, path in (("BF16", same), (args.gguf.stem, args.gguf)):
            options = {"gguf": str(path), "threads": args.threads, "max_context": args.max_context}
            wanted.append((f"llama.cpp, {name}", LlamaCpp, options))
    if installed("transformers") and installed("torch"):
        wanted.append(
            ("transformers, bf16", Transformers, {"model": args.model, "threads": args.threads})
        )
    return {label: Process(make, options) for label, make, options in wanted}


def installed(module: str) -> bool:
    """Whether a peer's module is there; says so when not."""
    if importlib.util.find_spec(module) is not None:
        return True
    print(f"{module} is not installed: left out", file=sys.stderr)
    return False


def measure(
    runtimes: dict[str, Process], prompts: list[Prompt], new_tokens: int
) -> dict[str, list[Written]]:
    found: dict[str, list[Written]] = {label: [] for label in runtimes}
    console = Console(stderr=True)
    for _, ids in track(prompts, "questions", console=console, disable=not console.is_terminal):
        for label, runtime in runtimes.items():
            found[label].append(runtime.write(ids, new_tokens))
    return found


def summarize(
    found: dict[str, list[Written]], tasks: list[str], ending_ids: list[int]
) -> dict[str, dict[str, Any]]:
    """Of each runtime: medians over the questions, and of its ratios to plain frspec."""
    plain = found[PLAIN]
    report = {}
    for label, written in found.items():
        pairs = list(zip(written, plain, strict=True))
        ratios = [w.tokens_per_s / p.tokens_per_s for w, p in pairs]
        by_task: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(tasks):
            own = [index for index, task in enumerate(tasks) if task == name]
            by_task[name] = {
                "questions": len(own),
                "over_plain": statistics.median(ratios[index] for index in own),
                "accept_length": statistics.fmean(written[index].accept_length for index in own),
            }
        report[label] = {
            "tokens_per_s": statistics.median(w.tokens_per_s for w in written),
            "first_token_s": statistics.median(w.first_s for w in written),
            "over_plain": statistics.median(ratios),
            "accept_length": statistics.fmean(w.accept_length for w in written),
            "same_text": sum(same_text(w, p, ending_ids) for w, p in pairs) / len(pairs),
            "tasks": by_task,
        }
    return report


def same_text(written: Written, plain: Written, ending_ids: list[int]) -> bool:
    """Up to where plain frspec ends the text; what runtimes write behind that is their own."""
    ends = (i for i, token in enumerate(plain.token_ids) if token in ending_ids)
    end = next(ends, len(plain.token_ids))
    return written.token_ids[:end] == plain.token_ids[:end]


def print_tables(report: dict[str, dict[str, Any]], questions: int) -> None:
    """As Markdown: all questions, then speed and accept length by task."""
    print(f"{questions} questions, greedy")
    rows = [
        [
            label, f"{row['tokens_per_s']:.1f}", f"{row['over_plain']:.2f}x",
            f"{1e3 * row['first_token_s']:.0f} ms", f"{row['accept_length']:.2f}",
            f"{100 * row['same_text']:.0f} %",
        ]
        for label, row in report.items()
    ]  # fmt: skip
    heads = ["", "tokens/s", "over plain", "first token", "accept length", "same text"]
    print("\n" + markdown_table(heads, rows))
    tasks = list(report[PLAIN]["tasks"])
    for figure, unit in (("over_plain", "x"), ("accept_length", "")):
        rows = [
            [label, *(f"{row['tasks'][task][figure]:.2f}{unit}" for task in tasks)]
            for label, row in report.items()
            if figure != "accept_length" or label.startswith("frspec")
        ]
        heads = [figure.replace("_", " "), *(TASKS[task].label for task in tasks)]
        print("\n" + markdown_table(heads, rows))


if __name__ == "__main__":
    sys.exit(main())
