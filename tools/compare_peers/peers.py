"""Runtimes side by side, each in a process of its own that waits while another works.

A peer writes a greedy continuation of given length and tells the seconds until its first token and
of the tokens behind it. All get the same token ids and the same number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass
class Written:
    """A continuation: token ids, seconds until the first one, seconds of the others."""

    token_ids: list[int]
    first_s: float
    rest_s: float
    accept_length: float = 1.0

    @property
    def tokens_per_s(self) -> float:
        return (len(self.token_ids) - 1) / self.rest_s


class Frspec:
    def __init__(self, model: str, threads: int, **options: Any):
        import frspec

        self._generator = frspec.Generator(model, threads=threads, **options)

    def write(self, prompt: list[int], new_tokens: int) -> Written:
        # A sequence that begins otherwise comes first: the others keep nothing of a prompt either.
        self._generator.generate([1 if prompt[0] == 0 else 0], max_new_tokens=1)
        result = self._generator.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True)
        lengths = result.accept_lengths
        return Written(
            result.token_ids,
            result.timings.prefill_s,
            result.timings.decode_s,
            sum(lengths) / max(len(lengths), 1),
        )


class LlamaCpp:
    """llama.cpp through llama-cpp-python."""

    def __init__(self, gguf: str, threads: int, max_context: int):
        from llama_cpp import Llama

        self._llama = Llama(
            gguf, n_ctx=max_context, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def write(self, prompt: list[int], new_tokens: int) -> Written:
        self._llama.reset()
        began = time.perf_counter()
        tokens: list[int] = []
        first_s = 0.0
        for token in self._llama.generate(prompt, temp=0.0, top_k=1, reset=True):
            tokens.append(int(token))
            if len(tokens) == 1:
                first_s = time.perf_counter() - began
            if len(tokens) == new_tokens:
                break
        return Written(tokens, first_s, time.perf_counter() - began - first_s)


class Transformers:
    """Hugging Face transformers in bf16, its own greedy `generate`."""

    def __init__(self, model: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, GenerationConfig

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self._model.generation_config = GenerationConfig()  # a folder's penalties are not greedy

    def write(self, prompt: list[int], new_tokens: int) -> Written:
        began = time.perf_counter()
        self._generate(prompt, 1)
        first_s = time.perf_counter() - began
        began = time.perf_counter()
        tokens = self._generate(prompt, new_tokens)
        return Written(tokens, first_s, time.perf_counter() - began - first_s)

    def _generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        ids = self._torch.tensor([prompt])
        with self._torch.inference_mode():
            found = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return found[0, len(prompt) :].tolist()


class Process:
    """A peer in a process of its own. make: one of the classes above; options: its arguments."""

    def __init__(self, make: Callable[..., Any], options: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, options), daemon=True)
        self._process.start()
        self._name = make.__name__
        theirs.close()
        self._receive()  # loaded

    def write(self, prompt: list[int], new_tokens: int) -> Written:
        with contextlib.suppress(OSError):  # it died: _receive says so
            self._pipe.send((prompt, new_tokens))
        return self._receive()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.join(10)

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(10)
            raise RuntimeError(
                f"the process of {self._name} died (exit code {self._process.exitcode})"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(pipe, make: Callable[..., Any], options: dict[str, Any]) -> None:
    try:
        peer = make(**options)
        peer.write([1, 2, 3], 4)  # the first pass touches memory and code for the first time
        pipe.send(None)
        while True:
            pipe.send(peer.write(*pipe.recv()))
    except EOFError:
        pass
    except Exception as error:
        pipe.send(RuntimeError(f"{make.__name__}: {type(error).__name__}: {error}"))
