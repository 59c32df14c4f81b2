"""Times plain decoding in Hugging Face transformers: static cache, eager and torch.compile.

The model has the shapes of a folder's config.json and random weights, made on the device. A step is
the forward pass of one token of one sequence and the arg max of its logits; compiled, it runs as a
CUDA graph (mode="reduce-overhead"). The report is written again after each part, so that what was
measured stays if a later part is cut off. Without torch and transformers it says so and exits with
0.

    python tools/compare_transformers.py --model DIR [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any


class Decoder:
    """A model of random weights with a static cache for one sequence."""

    def __init__(self, folder: Path, device: str, length: int) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

        self.torch = torch
        self.device = torch.device(device)
        config = AutoConfig.from_pretrained(folder)
        with self.device:
            self.model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        self.vocab_size = config.vocab_size
        self.cache = StaticCache(config=config, max_cache_len=length)
        # What forward() calls its cache, and whether it must be told positions, depends on the
        # version.
        parameters = inspect.signature(self.model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.wants_positions = "cache_position" in parameters
        self.step = self._step

    def _step(self, tokens: Any, positions: Any) -> Any:
        """tokens [1, n] at positions [n]: the token after the last of them, [1, 1]."""
        options = {self.cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        if self.wants_positions:
            options["cache_position"] = positions
        out = self.model(input_ids=tokens, position_ids=positions.unsqueeze(0), **options)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    def compile(self) -> None:
        self.step = self.torch.compile(self._step, mode="reduce-overhead", fullgraph=True)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def decode(self, context: int, new_tokens: int) -> float:
        """Seconds per token of new_tokens steps behind a made-up prompt."""
        torch = self.torch
        with torch.inference_mode(), self.device:
            self.cache.reset()
            prompt = (torch.arange(context) * 7919 + 101) % self.vocab_size
            token = self._step(prompt.unsqueeze(0), torch.arange(context))
            positions = torch.arange(context, context + new_tokens)
            self.synchronize()
            start = time.perf_counter()
            for i in range(new_tokens):
                token = self.step(token, positions[i : i + 1]).clone()  # a graph reuses its output
            self.synchronize()
            return (time.perf_counter() - start) / new_tokens


def measure(decoder: Decoder, args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    for _ in range(2):  # compiles and records the graph; once more when the cache was reset
        decoder.decode(args.context, args.warm_up)
    warm_up = time.perf_counter() - began
    seconds = [decoder.decode(args.context, args.new_tokens) for _ in range(args.repeats)]
    median = statistics.median(seconds)
    return {
        "ms_per_token": median * 1e3,
        "ms_per_token_all": [each * 1e3 for each in seconds],
        "tokens_per_s": 1 / median,
        "warm_up_s": warm_up,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="folder with a config.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="timed steps of each repeat")
    parser.add_argument("--warm-up", type=int, default=8, help="steps before them")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    args = parser.parse_args()

    report: dict[str, Any] = {
        "model": str(args.model),
        "context": args.context,
        "new_tokens": args.new_tokens,
    }

    def write(**parts: Any) -> None:
        report.update(parts)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    try:
        import torch
        import transformers
    except ImportError as error:
        write(skipped=f"{error.name or error} is not installed")
        print(f"skipped: {report['skipped']}")
        return 0
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        write(skipped="torch sees no GPU")
        print(f"skipped: {report['skipped']}")
        return 0
    is_cuda = args.device.startswith("cuda")
    write(
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name(args.device) if is_cuda else args.device,
    )
    decoder = Decoder(args.model, args.device, args.context + max(args.new_tokens, args.warm_up))
    for name in ("eager", "compiled"):
        if name == "compiled":
            decoder.compile()
        result = measure(decoder, args)
        write(**{name: result})
        print(f"{name:>9} {result['ms_per_token']:9.3f} ms a token, "
              f"{result['tokens_per_s']:8.1f} tokens/s", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
