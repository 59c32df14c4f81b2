"""Measures the CPU backend end to end: ratios of things that ran next to each other.

The memory of a shared machine may be twice as fast in one minute as in the next, so every ratio is
taken within a round, between runs that follow each other at once; printed are the median of the
rounds and, in brackets, the least and the greatest:

- plain decoding: the floor (weight bytes over the read bandwidth that bench_cpu measures before and
  after) over the time of a step;
- verification of trees of several sizes over a step of plain decoding before and after, at a
  context of about 100;
- prefill of 512 tokens in multiply-adds per second, and with torch installed over its bf16 products
  of the same shapes and row count, before and after.

    python tools/measure_cpu.py --model DIR --drafter DIR --bench build/tests/bench_cpu
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

import frspec

PREFILL = 512


def read_bandwidth(bench: str, threads: int) -> tuple[float, float]:
    """GB/s, and multiply-adds per nanosecond of the backend's kernel out of the L1 cache."""
    done = subprocess.run(
        [bench, str(threads), "1", "1"], capture_output=True, text=True, check=True
    )
    found = re.search(r"read bandwidth ([\d.]+) GB/s, peak ([\d.]+) GMAC/s", done.stdout)
    return float(found[1]), float(found[2])


NEAR_NS = 80


def cores(bench: str) -> str:
    """Whether the cores share a cache: "near" or "apart"."""
    done = subprocess.run([bench, "cores"], capture_output=True, text=True, check=True)
    return "near" if float(re.search(r"([\d.]+) ns", done.stdout)[1]) < NEAR_NS else "apart"


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def layer_shapes(config: dict) -> list[tuple[int, int]]:
    """(out, in) of every product of a layer."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q = config["num_attention_heads"] * head_dim
    kv = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head_dim
    return [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)] + [
        (ffn, hidden), (ffn, hidden), (hidden, ffn)
    ]  # fmt: skip


def torch_products(config: dict, threads: int):
    """A function that does a layer's products in torch's bf16, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    pairs = [
        (torch.randn(PREFILL, i, dtype=torch.bfloat16), torch.randn(o, i, dtype=torch.bfloat16))
        for o, i in layer_shapes(config)
    ]

    def run() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for x, weight in pairs:
                torch.nn.functional.linear(x, weight)
        return time.perf_counter() - began

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--bench", required=True, help="the binary bench_cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 6, 8, 16, 60])
    parser.add_argument("--steps", type=int, default=24, help="decoding steps per round")
    args = parser.parse_args()

    config = json.loads((Path(args.model) / "config.json").read_text())
    prompt = (np.arange(PREFILL) * 37 + 100) % 4000
    generators = {
        nodes: frspec.Generator(
            args.model,
            args.drafter,
            threads=args.threads,
            max_context=1024,
            tree=frspec.Tree(6, 10, nodes),
        )
        for nodes in args.nodes
    }
    torch_run = torch_products(config, args.threads)
    plain = generators[args.nodes[0]]

    def step(generator: frspec.Generator, method: str) -> tuple[float, float]:
        """Seconds of a whole round, and of its verification alone."""
        result = generator.generate(
            prompt[:100], max_new_tokens=args.steps + 1, method=method, ignore_eos=True
        )
        steps = len(result.accept_lengths)
        return result.timings.decode_s / steps, result.timings.verify_s / steps

    samples: dict[str, dict[str, list[float]]] = {"near": {}, "apart": {}}
    place = cores(args.bench)

    def record(**values: float) -> None:
        """Counts the values if the cores are where they were when the last ones were recorded."""
        nonlocal place
        before, place = place, cores(args.bench)
        for name, value in values.items():
            if before == place:
                samples[place].setdefault(name, []).append(value)

    products = sum(o * i for o, i in layer_shapes(config)) * config["num_hidden_layers"] * PREFILL
    for number in range(args.rounds):
        record()
        before = read_bandwidth(args.bench, args.threads)
        seconds, _ = step(plain, "plain")
        after = read_bandwidth(args.bench, args.threads)
        bandwidth = (before[0] + after[0]) / 2
        record(
            bandwidth=bandwidth,
            peak=(before[1] + after[1]) / 2,
            decoding=1e3 * seconds,
            floor=plain._engine.step_bytes / bandwidth / 1e9 / seconds,
        )

        alone = step(plain, "plain")[1]
        for nodes, generator in generators.items():
            _, verify = step(generator, "eagle2")
            again = step(plain, "plain")[1]
            record(**{f"nodes {nodes}": 2 * verify / (alone + again)})
            alone = again

        torch_before = torch_run() if torch_run else 0.0
        fresh = np.concatenate([[number + 5], prompt[1:]])  # nothing to reuse
        prefill = plain.generate(fresh, max_new_tokens=1, method="plain").timings.prefill_s
        over_torch = {}
        if torch_run:
            torch_seconds = (torch_before + torch_run()) / 2 * config["num_hidden_layers"]
            over_torch["over torch"] = torch_seconds / prefill
        record(prefill=products / prefill / 1e9, **over_torch)

    print(f"{args.model}: {plain._engine.device_description}, {args.rounds} rounds")
    words = {
        "bandwidth": "read bandwidth, GB/s",
        "peak": "peak, GMAC/s",
        "decoding": "plain decoding, ms a token",
        "floor": "  share of the floor",
        **{
            f"nodes {nodes}": f"verification of {nodes} nodes over one token"
            for nodes in generators
        },
        "prefill": f"prefill of {PREFILL} tokens, GMAC/s",
        "over torch": "  over torch's bf16 products",
    }
    for where, values in samples.items():
        if not values:
            continue
        print(f"cores {where}:")
        for name, text in words.items():
            if name in values:
                print(f"  {text:40s} {spread(values[name])}, {len(values[name])} times")


if __name__ == "__main__":
    main()
