"""What tools/gpu_report.py writes: the targets with what was measured, and the tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

SHAPES = {"llama-3-8b": "Llama-3-8B", "llama-3.2-1b": "Llama-3.2-1B"}
NAMES = SHAPES | {
    f"{shape}.no_overlap": f"{name} with FRSPEC_PDL=0" for shape, name in SHAPES.items()
}
LAYERS = {"llama-3-8b": 32, "llama-3.2-1b": 16}
STAGES = {"embedding": "embedding", "layers": "layers", "head": "head", "topk": "softmax, top-k",
          "tree": "tree"}  # fmt: skip
# What results raise whose piece did not get that far.
INCOMPLETE = (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError)
STEP_OPS = ("qkv", "o", "gate and up", "down")  # once a layer; the head once


def targets(pieces: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked for, what was measured (None: nothing was), and whether it is met."""
    bench, shapes = pieces["bench"]["results"], pieces["shapes"]["results"]
    rows: list[dict[str, Any]] = []

    def add(name: str, sign: str, wanted: float, measure: Callable[[], float], unit: str) -> None:
        try:
            value = measure()
        except INCOMPLETE:
            value = None  # the piece did not get that far
        met = None if value is None else value >= wanted if sign == ">=" else value <= wanted
        rows.append({"target": name, "sign": sign, "wanted": wanted, "measured": value,
                     "unit": unit, "met": met})  # fmt: skip

    def runs(shape: str) -> list[dict[str, Any]]:
        return bench[shape]["runs"]

    def speed_up(shape: str, run: int) -> float:
        """Over plain decoding; planted accept lengths count as they were asked for, because a text
        has too few rounds to come close to them."""
        plain, drafted = runs(shape)[run]["plain"], runs(shape)[run]["drafted"]
        if not drafted.get("planted_accept_length"):
            return drafted["over_plain"]["median"]
        rounds = plain["round_ms"]["median"] / drafted["round_ms"]["median"]
        return drafted["planted_accept_length"] * rounds

    def over_first(shape: str) -> float:
        drafted = runs(shape)[1]["drafted"]
        # Where the two ran side by side, and not at planted accept lengths.
        if "over_first" in drafted and not drafted.get("planted_accept_length"):
            return drafted["over_first"]["median"]
        return speed_up(shape, 1) / speed_up(shape, 0)

    for shape, share in (("llama-3-8b", 0.92), ("llama-3.2-1b", 0.80)):
        add(
            f"{SHAPES[shape]}: plain decoding, share of the copy bandwidth", ">=", share,
            lambda s=shape: statistics.median(r["plain"]["share_of_floor"] for r in runs(s)), "%",
        )  # fmt: skip
    for shape in SHAPES:
        add(
            f"{SHAPES[shape]}: verification of 60 nodes over one token", "<=", 1.10,
            lambda s=shape: max(r["drafted"]["verify_over_plain"]["median"] for r in runs(s)), "x",
        )  # fmt: skip
    for shape in SHAPES:
        add(
            f"{SHAPES[shape]}: a draft level over 32,768 tokens, over its byte floor", "<=", 1.25,
            lambda s=shape: [
                row["us"] / row["floor_us"]
                for row in shapes[s]["drafting"] if row["vocab_size"] == 32768
            ][0], "x",
        )  # fmt: skip
    for shape, gain in (("llama-3-8b", 2.60), ("llama-3.2-1b", 1.65)):
        add(f"{SHAPES[shape]}: FR-Spec over plain decoding", ">=", gain,
            lambda s=shape: speed_up(s, 1), "x")  # fmt: skip
    add("Llama-3-8B: FR-Spec over EAGLE-2", ">=", 1.14,
        lambda: over_first("llama-3-8b"), "x")  # fmt: skip
    for shape in SHAPES:
        for n in (1, 60):
            add(
                f"{SHAPES[shape]}: cost of invariance, products of a step, {n} row{'s'[: n > 1]}",
                "<=", 0.05,
                lambda s=shape, n=n: step_us(shapes[s], s, n, "us")
                / step_us(shapes[s], s, n, "free_us") - 1, "%",
            )  # fmt: skip
    for shape in SHAPES:
        add(f"{SHAPES[shape]}: memory beside the plan", "<=", 0.02,
            lambda s=shape: beside_the_plan(shapes[f"{s}.memory"]["memory"]), "%")  # fmt: skip
    return rows


def beside_the_plan(memory: dict[str, Any]) -> float:
    """How far what loading took is from the plan, as a share of it."""
    return abs(memory["taken_by_load_bytes"] / memory["planned_bytes"] - 1)


def step_us(shape: dict[str, Any], name: str, rows: int, field: str) -> float:
    """Microseconds of the products of one pass."""
    by_op = {row["op"]: row[field] for row in shape["linears"] if row["rows"] == rows}
    return LAYERS[name] * sum(by_op[op] for op in STEP_OPS) + by_op["head"]


# ==== Markdown


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def amount(value: float | None, unit: str) -> str:
    if value is None:
        return "not measured"
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.3f}x"


def markdown(report: dict[str, Any]) -> str:
    pieces = report["pieces"]
    lines = [*machine_part(report["machine"]), *pieces_part(pieces)]
    lines += ["## Targets", ""]
    lines += table(
        ("", "wanted", "measured", ""),
        [
            (row["target"], f"{row['sign']} {amount(row['wanted'], row['unit'])}",
             amount(row["measured"], row["unit"]),
             {True: "met", False: "**missed**", None: ""}[row["met"]])
            for row in report["targets"]
        ],
    )  # fmt: skip
    lines += [
        "Weights are random and of the models' true shapes, and accept lengths are planted: the"
        " drafter does its work, and then the text that plain decoding wrote takes the place of its"
        " guesses, so often that as many tokens are accepted as the FR-Spec paper reports. Ratios"
        " are of runs beside each other in one process.",
        "",
    ]
    parts = (exactness_part, bench_part, shapes_part, transformers_part, resources_part)
    for part, piece in zip(
        parts, ("exactness", "bench", "shapes", "transformers", "resources"), strict=True
    ):
        lines += complete(piece, part, pieces)
    return "\n".join(lines).rstrip() + "\n"


def complete(name: str, part: Callable[..., list[str]], *results: Any) -> list[str]:
    """The lines of a part, or what is wrong with the results that it was to be made of."""
    try:
        return part(*results)
    except INCOMPLETE as error:
        return [f"The results of `{name}` are incomplete ({error!r}).", ""]


def machine_part(machine: dict[str, Any]) -> list[str]:
    gpu = machine.get("gpu")
    lines = [f"# GPU report: {gpu['name'] if gpu else 'no GPU'}", ""]
    if gpu is None:
        lines += ["nvidia-smi found no GPU on this machine, so nothing ran on a device.", ""]
    lines += table(
        ("", ""),
        [
            ("commit", machine.get("commit")),
            ("date", machine.get("date")),
            *((f"GPU {key}", value) for key, value in (gpu or {}).items()),
            ("CUDA toolkit", machine.get("cuda_toolkit")),
            ("CPU", f"{machine.get('cpu')}, {machine.get('cores')} cores"),
            ("system", machine.get("system")),
        ],
    )
    return lines


def pieces_part(pieces: dict[str, Any]) -> list[str]:
    def note(name: str, piece: dict[str, Any]) -> str:
        results = piece["results"]
        last_line = piece.get("last_line", "").replace("|", "/")
        if name == "tests" and results:
            counted = "{passed} of {run} tests passed".format_map(results["cuda_tests"])
            return f"{counted}; {last_line}" if last_line else counted
        if name == "sanitizer" and results:
            return "; ".join(f"{tool}: {summary}" for tool, summary in results.items())
        return last_line

    return ["## Pieces", ""] + table(
        ("piece", "", "seconds", ""),
        [(name, f"**{p['status']}**" if p["status"] in ("failed", "timed out") else p["status"],
          p.get("seconds", ""), note(name, p)) for name, p in pieces.items()],
    )  # fmt: skip


def exactness_part(pieces: dict[str, Any]) -> list[str]:
    results = pieces["exactness"]["results"]
    if not results:
        return []
    rows = []
    lines = ["## Exactness: speculative text against plain text", ""]
    for name, result in results.items():
        if isinstance(result, str):  # of tools/check_exactness.py
            lines += [f"Real weights, {name}:", "", "```", *result.splitlines(), "```", ""]
            continue
        rows += [
            (name.partition(".T")[0], f"{result['temperature']:g}", run["vocab_size"],
             "yes" if result["planted"] else "no", f"{run['drafted']['accept_length']:.2f}",
             "the same" if run["drafted"]["same_text"] else "**different**")
            for run in result["runs"]
        ]  # fmt: skip
    head = ("random weights", "temperature", "draft head", "planted", "accept length", "text")
    if not any(isinstance(result, str) for result in results.values()):
        lines += ["Real weights were not given (`FRSPEC_MODELS`).", ""]
    return lines + (table(head, rows) if rows else [])


def bench_part(pieces: dict[str, Any]) -> list[str]:
    lines = []
    for shape, result in pieces["bench"]["results"].items():
        lines += complete(f"bench.{shape}", bench_of_shape, shape, result)
    return lines


def bench_of_shape(shape: str, result: dict[str, Any]) -> list[str]:
    runs = result["runs"]
    plain = runs[0]["plain"]
    rows: list[tuple[Any, ...]] = [
        ("plain", f"{plain['tokens_per_s']['median']:.1f}", "1.00x", "1.00",
         f"{plain['first_token_ms']['median']:.1f}", f"{plain['round_ms']['median']:.3f}", "",
         f"{plain['verify_ms']['median']:.3f}", amount(plain["share_of_floor"], "%"), "")
    ]  # fmt: skip
    for run in runs:
        drafted = run["drafted"]
        speed = drafted["over_plain"]
        rows.append(
            (f"draft head: {run['vocab_size']}", f"{drafted['tokens_per_s']['median']:.1f}",
             f"{speed['median']:.2f}x ({speed['p10']:.2f} to {speed['p90']:.2f})",
             f"{drafted['accept_length']:.2f}", f"{drafted['first_token_ms']['median']:.1f}",
             f"{drafted['round_ms']['median']:.3f}", f"{drafted['draft_ms']['median']:.3f}",
             f"{drafted['verify_ms']['median']:.3f}", amount(drafted["share_of_floor"], "%"),
             "the same text" if drafted["same_text"] else "**another text**")
        )  # fmt: skip
    bandwidth = runs[0]["bandwidth_bytes_per_s"]
    lines = [
        f"## {NAMES.get(shape, shape)}, prompt of {runs[0]['prompt_tokens']} tokens", "",
        f"Copies at {bandwidth * 1e-9:.0f} GB/s (bytes read and written); a plain step reads"
        f" {runs[0]['step_bytes'] * 1e-9:.2f} GB, floor {runs[0]['floor_ms']:.3f} ms.", "",
        *table(("", "tokens/s", "over plain", "accept length", "first token ms", "round ms",
                "draft ms", "verify ms", "of the floor", ""), rows),
        *breakdown_table(runs),
    ]  # fmt: skip
    if not result["together"]:
        lines += ["Memory did not hold both drafters at once: plain decoding ran beside each"
                  " of them, and stands here beside the first.", ""]  # fmt: skip
    return lines


def breakdown_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Where the time of drafting goes, as in figure 6 of the FR-Spec paper."""
    rows = []
    for run in runs:
        breakdown = run["drafted"]["breakdown"]
        stages = [
            f"{stage['median']:.3f} ({100 * stage['share']:.0f} %)"
            for stage in (breakdown["stages_ms"][name] for name in STAGES)
        ]
        rows.append((f"draft head: {run['vocab_size']}",
                     f"{breakdown['draft_ms']['median']:.3f}", *stages))  # fmt: skip
    return table(("ms of drafting, with time stamps in it", "all of it", *STAGES.values()), rows)


def shapes_part(pieces: dict[str, Any]) -> list[str]:
    lines = []
    results = pieces["shapes"]["results"]
    for shape, result in results.items():
        name = shape.removesuffix(".memory")
        part = parts_of_shape if name == shape else memory_of_shape
        lines += complete(f"shapes.{shape}", part, NAMES.get(name, name), result)
    return lines


def memory_of_shape(name: str, result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    planned = memory["planned_bytes"]
    loaded, used = memory["taken_by_load_bytes"], memory["taken_after_generation_bytes"]
    return [
        f"{name}: the memory plan says {planned / 1e9:.3f} GB; loading takes {loaded / 1e9:.3f} GB"
        f" ({100 * (loaded / planned - 1):+.2f} %), and with the kernels and graphs of the"
        f" first rounds it is {used / 1e9:.3f} GB ({100 * (used / planned - 1):+.2f} %).",
        "",
    ]


def parts_of_shape(name: str, result: dict[str, Any]) -> list[str]:
    lines = [
        f"## Parts of {name}", "",
        f"Copies at {result['bandwidth_bytes_per_s'] * 1e-9:.0f} GB/s. `free` is the same"
        " kernel with the parts of k chosen for the number of rows.", "",
    ]  # fmt: skip
    if "linears" in result:
        lines += table(
            ("product", "rows", "us", "of the floor", "cuBLAS us", "over cuBLAS", "free us"),
            [(r["op"], r["rows"], f"{r['us']:.1f}", amount(r["share"], "%"),
              f"{r['cublas_us']:.1f}", f"{r['us'] / r['cublas_us']:.2f}x",
              f"{r['free_us']:.1f}") for r in result["linears"]],
        )  # fmt: skip
    if "attention" in result:
        lines += table(
            ("attention, context", "rows", "us", "of the floor"),
            [(r["context"], r["rows"], f"{r['us']:.1f}", amount(r["share"], "%"))
             for r in result["attention"]],
        )  # fmt: skip
    if "drafting" in result:
        lines += table(
            ("draft level, head", "us", "over its floor"),
            [(r["vocab_size"], f"{r['us']:.1f}", f"{r['us'] / r['floor_us']:.2f}x")
             for r in result["drafting"]],
        )  # fmt: skip
    if upload := result.get("upload"):
        lines += [
            f"Weights come to the device at {upload['loader_gb_per_s']:.1f} GB/s"
            f" ({upload['loader_from_fp32_gb_per_s']:.1f} converted from fp32); a copy from"
            f" pinned memory runs at {upload['pinned_copy_gb_per_s']:.1f} GB/s.",
            "",
        ]
    return lines


def transformers_part(pieces: dict[str, Any]) -> list[str]:
    results, bench = pieces["transformers"]["results"], pieces["bench"]["results"]
    if not results:
        return []
    lines = ["## Beside Hugging Face transformers, plain decoding", ""]
    rows = []
    for shape, result in results.items():
        if "skipped" in result:
            lines += [f"{SHAPES.get(shape, shape)}: skipped, {result['skipped']}.", ""]
            continue
        own = None
        if shape in bench:
            own = bench[shape]["runs"][0]["plain"]["tokens_per_s"]["median"]
        for name in ("eager", "compiled"):
            speed = result[name]["tokens_per_s"] if name in result else None
            rows.append(
                (SHAPES.get(shape, shape),
                 f"static cache, {name} (torch {result['torch']}, {result['transformers']})",
                 f"{speed:.1f}" if speed else "not measured", f"{own:.1f}" if own else "",
                 f"{own / speed:.2f}x" if own and speed else "")
            )  # fmt: skip
    head = ("", "transformers", "its tokens/s", "ours", "ours over it")
    return lines + (table(head, rows) if rows else [])


def resources_part(pieces: dict[str, Any]) -> list[str]:
    kernels = pieces["resources"]["results"].get("kernels")
    if not kernels:
        return []
    spilling = [k for k in kernels if k["spill_stores"] + k["spill_loads"] > 0]
    most = max(kernels, key=lambda k: k["registers"])
    lines = [
        "## Kernels", "",
        f"{len(kernels)} kernels; {len(spilling)} spill registers; the most registers:"
        f" {most['registers']}, {most['file']}: `{most['name']}`.", "",
    ]  # fmt: skip
    return lines + [f"- spills: {k['file']}: `{k['name']}` on {k['arch']}" for k in spilling]
