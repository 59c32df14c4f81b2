"""The target's own answers to the questions of a corpus, many at a time with transformers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress

from frspec.errors import RequestError
from frspec.tokenizer import Tokenizer

from .conversations import Skipped, TrainingError, first_question, read_conversations

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Writing:
    """How answers are written."""

    max_prompt_tokens: int  # longer questions are left out
    max_new_tokens: int
    temperature: float
    batch: int  # answers written at a time
    device: str


class Writer:
    """The target in PyTorch, in bf16."""

    def __init__(self, folder: Path, writing: Writing):
        from transformers import AutoModelForCausalLM, GenerationConfig

        self.writing = writing
        self.tokenizer = Tokenizer.load(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = model.to(writing.device).eval()
        # What a folder says of penalties and samples is not for the target's own distribution.
        self.model.generation_config = GenerationConfig()

    def encode(self, messages: Messages) -> list[int] | None:
        """None when the chat template has no form for the messages."""
        try:
            text = self.tokenizer.chat(messages)
        except RequestError:
            if self.tokenizer.has_chat_template:
                return None
            raise
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.inference_mode()
    def write(self, prompts: list[list[int]], seed: int) -> list[str]:
        """A text for each prompt, without the token that ends it."""
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ending = self.tokenizer.ending_ids
        padding = ending[0] if ending else 0
        tokens = torch.full((len(prompts), longest), padding)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):  # padding in front, so that all end at one place
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        sampling = {"do_sample": False}
        if self.writing.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.writing.temperature, "top_k": 0}
        written = self.model.generate(
            input_ids=tokens.to(self.writing.device),
            attention_mask=mask.to(self.writing.device),
            max_new_tokens=self.writing.max_new_tokens,
            eos_token_id=ending or None,
            pad_token_id=padding,
            **sampling,
        )
        answers = []
        for row in written[:, longest:].tolist():
            text = itertools.takewhile(lambda token: token not in ending, row)
            answers.append(self.tokenizer.decode(list(text)))
        return answers


def write_answers(
    folder: Path,
    questions: Path,
    out: Path,
    writing: Writing,
    limit: int | None,
    progress: Progress,
    skipped: Skipped | None = None,
) -> None:
    """Asks the first question of each conversation and writes the answers as JSON lines.

    Lines that `out` holds already are not written again. skipped: as in read_conversations.
    """
    done = out.read_bytes() if out.is_file() else b""
    whole = done[: done.rfind(b"\n") + 1]  # without what a killed run left of a line
    begun = whole.count(b"\n")
    writer = Writer(folder, writing)
    asked = list(itertools.islice(_questions(writer, questions, skipped), limit))
    if [messages for messages, _ in asked[:begun]] != _asked_before(whole):
        raise TrainingError(
            f"{out}: expected answers to the same questions in the same order, found others; give"
            " the model, questions, --batch and --max-prompt-tokens of before, or a new file"
        )
    task = progress.add_task("answers", total=len(asked), completed=begun)
    with out.open("r+b" if done else "wb") as file:
        file.truncate(len(whole))
        file.seek(len(whole))
        # Batches begin where they would have in one run, so that their samples are the same.
        for start in range(begun - begun % writing.batch, len(asked), writing.batch):
            batch = asked[start : start + writing.batch]
            answers = writer.write([prompt for _, prompt in batch], seed=start)
            pairs = list(zip(batch, answers, strict=True))[max(begun - start, 0) :]
            for (messages, _), answer in pairs:
                messages = [*messages, {"role": "assistant", "content": answer}]
                line = json.dumps({"messages": messages}, ensure_ascii=False)
                file.write(line.encode() + b"\n")
            file.flush()
            progress.advance(task, len(pairs))


def _asked_before(lines: bytes) -> list[Messages] | None:
    """None when the lines are not answers."""
    try:
        return [json.loads(line)["messages"][:-1] for line in lines.splitlines()]
    except (ValueError, KeyError, TypeError):
        return None


def _questions(
    writer: Writer, path: Path, skipped: Skipped | None
) -> Iterator[tuple[Messages, list[int]]]:
    """Questions with their tokens; eight batches at a time are put in order of length."""
    questions = filter(None, map(first_question, read_conversations(path, skipped)))
    encoded = ((question, writer.encode(question)) for question in questions)
    limit = writer.writing.max_prompt_tokens
    short = ((question, ids) for question, ids in encoded if ids and len(ids) <= limit)
    while pool := list(itertools.islice(short, 8 * writer.writing.batch)):
        yield from sorted(pool, key=lambda item: len(item[1]))
