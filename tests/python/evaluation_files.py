"""Small data files for `frspec eval`, and a tiny model with drafter and ranking to answer them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from command_line import write_talking_model
from frspec import EvaluationError
from frspec.evaluation.sandbox import check_isolation
from reference import tiny

# GSM8K's eight examples are about 460 words, each a token of the tiny tokenizer.
MODEL = tiny.FAMILIES["llama3"].with_(name="evaluated", tokenizer=True, max_position=4096)

SPEC_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["w7 w8", "w9"]},
    {"question_id": 82, "category": "stem", "turns": ["w17 w8", "w19"]},
    {"question_id": 161, "category": "translation", "turns": ["w10 w11 w12"]},
    {"question_id": 162, "category": "translation", "turns": ["w20 w21"]},
    {"question_id": 241, "category": "summarization", "turns": ["w13"]},
    {"question_id": 321, "category": "qa", "turns": ["w14 w15"]},
    {"question_id": 401, "category": "math_reasoning", "turns": ["w16"]},
    {"question_id": 481, "category": "rag", "turns": ["w17 w18"]},
]
GSM8K = [
    {"question": "w30 w31?", "answer": "w32\n#### 1,234"},
    {"question": "w33?", "answer": "w34\n#### -5"},
]
HUMAN_EVAL = [
    {
        "task_id": f"Test/{number}",
        "prompt": f'def add_{number}(x):\n    """ Add {number}. """\n',
        "entry_point": f"add_{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": f"def check(candidate):\n    assert candidate(2) == {2 + number}\n",
    }
    for number in (1, 2)
]


@dataclass(frozen=True)
class EvaluationFiles:
    model: Path
    drafter: Path
    heads: Path  # of Medusa
    ranking: Path
    spec_bench: Path
    gsm8k: Path
    human_eval: Path

    def arguments(self, out: Path, *tasks: str, sizes=("full", 128)) -> list[object]:
        """A command line of `frspec eval` over the tasks."""
        return [
            "eval", "--model", self.model, "--drafter", self.drafter, "--ranking", self.ranking,
            "--vocab-sizes", *sizes, "--tasks", *tasks, "--max-new-tokens", 12, "--out", out,
            "--spec-bench", self.spec_bench, "--gsm8k", self.gsm8k,
            "--human-eval", self.human_eval, "--no-plots",
        ]  # fmt: skip


def write_evaluation_files(root: Path, ranking_writer) -> EvaluationFiles:
    model = write_talking_model(root / "model", MODEL)
    drafter = tiny.write_drafter(root / "drafter", MODEL, model, tiny.TinyDrafter(noise=0))
    ranking = root / "ranking.safetensors"
    order = tiny.frequent_tokens(tiny.Llama.load(model))
    ranking_writer(ranking, order, tiny.tokenizer_fingerprint(MODEL))
    files = {
        name: write_json_lines(root / f"{name}.jsonl", records)
        for name, records in (
            ("spec_bench", SPEC_BENCH), ("gsm8k", GSM8K), ("human_eval", HUMAN_EVAL),
        )
    }  # fmt: skip
    heads = tiny.write_medusa(root / "heads", MODEL, model, tiny.TinyMedusa())
    return EvaluationFiles(model, drafter, heads, ranking, **files)


def write_json_lines(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def skip_without_isolation() -> None:
    """Skips where the system lets no process isolate another; any other failure is one."""
    try:
        check_isolation()
    except EvaluationError as error:
        text = str(error)
        if any(why in text for why in ("not permitted", "Permission denied", "found darwin")):
            pytest.skip(text)
        raise
