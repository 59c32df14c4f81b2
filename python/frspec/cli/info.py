"""`frspec info`: what a model takes, and what this build can do, without loading weights."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from .. import __version__, _core
from ..console import format_bytes, print_json, write_table
from ..errors import RequestError
from ..generator import plan_engine
from ..options import add_machine_options, add_model_options, add_tree_options, generator_options

_EPILOG = """\
examples:
  frspec info
  frspec info --model ./model --max-context 8192
  frspec info --model ./model --drafter ./drafter --memory-limit 2GB --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec info`."""
    parser.description = (
        "Prints the memory that a model would take, by what it is for, without loading weights,"
        " and what this build supports. Without --model only the latter."
    )
    parser.epilog = _EPILOG
    add_model_options(parser, required=False)
    add_tree_options(parser)
    add_machine_options(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    for option in ("drafter", "ranking", "vocab_size", "medusa_choices"):
        if args.model is None and getattr(args, option) is not None:
            raise RequestError(f"--{option.replace('_', '-')} needs a --model")
    facts: dict[str, Any] = {"build": _describe_build()}
    if args.model is not None:
        facts |= _describe_model(args)
    if args.json:
        print_json(facts)
        return 0
    _print_build(facts["build"])
    if args.model is not None:
        print()
        _print_model(args.model, facts["model"])
        print()
        _print_plan(facts["memory"])
    return 0


def _describe_build() -> dict[str, Any]:
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cuda": _core.cuda_build(),
        "devices": _core.devices(),
    }


def _describe_model(args: argparse.Namespace) -> dict[str, Any]:
    engine, folder = plan_engine(**generator_options(args))
    config = _read_config(folder)
    heads = config["num_attention_heads"]
    plan = dict(engine.plan)
    available = engine.available_bytes
    if args.memory_limit is not None:
        available = min(args.memory_limit, available)
    total = sum(plan.values())
    return {
        "model": {
            "architecture": (config.get("architectures") or [config.get("model_type", "")])[0],
            "layers": config["num_hidden_layers"],
            "hidden_size": config["hidden_size"],
            "attention_heads": heads,
            "key_value_heads": config.get("num_key_value_heads") or heads,
            "vocab_size": engine.vocab_size,
            "dtype": engine.dtype,
            "step_bytes": engine.step_bytes,
            "draft_vocab_size": engine.draft_vocab_size or None,
        },
        "memory": {
            "device": engine.device,
            "max_context": engine.max_context,
            "plan": plan,
            "total_bytes": total,
            "available_bytes": available,
            "fits": total <= available,
        },
    }


def _read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))


def _print_build(build: dict[str, Any]) -> None:
    rows = [["python", build["python"]], ["platform", build["platform"]]]
    rows.append(["built with CUDA", build["cuda"]])
    for device in build["devices"]:
        text = device["description"]
        if device["available"]:
            text += f", {format_bytes(device['available_bytes'])} of memory available"
        else:
            text = f"no: {text}"
        rows.append([device["name"], text])
    write_table(f"frspec {build['version']}", ["", ""], rows)


def _print_model(name: str, model: dict[str, Any]) -> None:
    rows = [
        ["architecture", model["architecture"]],
        ["layers", f"{model['layers']} of hidden size {model['hidden_size']}"],
        [
            "attention",
            f"{model['attention_heads']} heads, {model['key_value_heads']} of keys and values",
        ],
        ["vocabulary", f"{model['vocab_size']:,} tokens"],
        ["weights in memory", model["dtype"]],
        ["a decoding step reads", format_bytes(model["step_bytes"])],
    ]
    if model["draft_vocab_size"] is not None:
        rows.append(["drafter scores", f"{model['draft_vocab_size']:,} tokens"])
    write_table(name, ["", ""], rows)


def _print_plan(memory: dict[str, Any]) -> None:
    rows = [[part, f"{count:,}"] for part, count in memory["plan"].items()]
    rows.append(["total", f"{memory['total_bytes']:,}"])
    title = f"memory plan on {memory['device']} for a context of {memory['max_context']:,} tokens"
    write_table(title, ["", "bytes"], rows)
    verdict = "fits into" if memory["fits"] else "does not fit into"
    print(f"{verdict} the {memory['available_bytes']:,} bytes available")
