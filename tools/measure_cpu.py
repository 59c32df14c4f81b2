"""Measures the CPU backend end to end, every ratio from one run.

What is timed is interleaved, round by round, so that a noisy machine disturbs all of it alike, and
the best of the rounds counts:

- read bandwidth of the memory (bench_cpu), which is the floor of a decoding step: weight bytes over
  bandwidth;
- plain decoding, and verification of trees of several sizes, per step, at a context of about 100;
- prefill of 512 tokens, as multiply-adds per second;
- with torch installed: its bf16 products of the same shapes and row count.

    python tools/measure_cpu.py --model DIR --drafter DIR --bench build/tools/bench_cpu
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path

import numpy as np

import frspec

PREFILL = 512


def read_bandwidth(bench: str, threads: int) -> tuple[float, float]:
    """GB/s and fp32 multiply-adds per nanosecond that `threads` threads reach."""
    done = subprocess.run(
        [bench, str(threads), "2", "1"], capture_output=True, text=True, check=True
    )
    found = re.search(r"read bandwidth ([\d.]+) GB/s, peak ([\d.]+) GMAC/s", done.stdout)
    return float(found[1]), float(found[2])


def layer_shapes(config: dict) -> list[tuple[int, int]]:
    """(out, in) of every product of a layer."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q = config["num_attention_heads"] * head_dim
    kv = config.get("num_key_value_heads", config["num_attention_heads"]) * head_dim
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
    parser.add_argument("--rounds", type=int, default=5)
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
    best: dict[int | str, float] = {}

    def keep(key: int | str, seconds: float) -> None:
        best[key] = min(best.get(key, float("inf")), seconds)

    bandwidth = peak = 0.0
    for number in range(args.rounds):
        measured = read_bandwidth(args.bench, args.threads)
        bandwidth, peak = max(bandwidth, measured[0]), max(peak, measured[1])
        for nodes, generator in generators.items():
            for method in ("plain", "eagle2"):
                result = generator.generate(
                    prompt[:100], max_new_tokens=args.steps + 1, method=method, ignore_eos=True
                )
                timings, steps = result.timings, len(result.accept_lengths)
                if method == "plain":
                    keep("step", timings.decode_s / steps)
                    keep(1, timings.verify_s / steps)
                else:
                    keep(nodes, timings.verify_s / steps)
        fresh = np.concatenate([[number + 5], prompt[1:]])  # nothing to reuse
        result = generator.generate(fresh, max_new_tokens=1, method="plain")
        keep("prefill", result.timings.prefill_s)
        if torch_run is not None:
            keep("torch", torch_run())

    engine = generator._engine
    floor = engine.step_bytes / bandwidth / 1e9
    products = sum(o * i for o, i in layer_shapes(config)) * config["num_hidden_layers"]
    print(f"{args.model}: {engine.device_description}")
    print(f"read bandwidth {bandwidth:.1f} GB/s, fp32 peak {peak:.1f} GMAC/s")
    print(
        f"plain decoding {best['step'] * 1e3:.2f} ms a token, floor {floor * 1e3:.2f} ms"
        f" ({engine.step_bytes / 1e6:.0f} MB): {floor / best['step']:.2f} of the floor"
    )
    for nodes in args.nodes:
        bound = max(floor, nodes * engine.step_bytes / 2 / peak / 1e9)
        print(
            f"verification of {nodes:3d} nodes {best[nodes] * 1e3:7.2f} ms:"
            f" {best[nodes] / best[1]:5.2f} x one token (this machine's bound {bound / floor:.2f})"
        )
    rate = products * PREFILL / best["prefill"] / 1e9
    print(
        f"prefill of {PREFILL} tokens {best['prefill'] * 1e3:.0f} ms: {rate:.1f} GMAC/s,"
        f" {rate / peak:.2f} of the fp32 peak"
    )
    if torch_run is not None:
        torch_rate = products / config["num_hidden_layers"] * PREFILL / best["torch"] / 1e9
        print(f"torch bf16 products {torch_rate:.1f} GMAC/s: prefill is {rate / torch_rate:.2f} x")


if __name__ == "__main__":
    main()
