"""The flagship promise on real weights: speculative text is the target's own text.

SmolLM2 comes from where the demo gets it, with the drafter and ranking that the package ships.
FRSPEC_QWEN_DIR may name a converted Qwen2.5-Coder-0.5B-Instruct; its drafter is beside the
repository. `tools/check_exactness.py` does the same with every prompt and setting.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import frspec
from frspec.demo_model import DRAFTER, RANKING, demo_model
from frspec.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"
SPEC_BENCH = SHARED / "data" / "spec_bench.jsonl"
QWEN_DRAFTER = SHARED / "drafters" / "qwen2.5-coder-0.5b-instruct-eagle"

PROMPTS = 24
SETTINGS = [  # (sub-vocabulary, tree); every prompt runs in one of them
    ("full", "2x3x4"),
    (8192, "4x4x6@0.08"),
    (32768, "1x2x3"),
    (16384, "5x8x40"),
]


def questions() -> list[str]:
    if not SPEC_BENCH.is_file():
        pytest.skip(f"{SPEC_BENCH} is absent")
    lines = SPEC_BENCH.read_text(encoding="utf-8").splitlines()
    turns = [json.loads(line)["turns"][0] for line in lines]
    return [turns[i * len(turns) // PROMPTS] for i in range(PROMPTS)]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    try:
        return demo_model()
    except frspec.HubError as error:
        pytest.skip(str(error))


def check_same_text(model: Path, drafter: Path, ranking: Path, new_tokens: int) -> None:
    prompts = [[{"role": "user", "content": question[:1200]}] for question in questions()]
    samplings = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 42})
    accepted = []
    for index, (size, tree) in enumerate(SETTINGS):
        generator = frspec.Generator(
            model,
            drafter,
            ranking,
            vocab_size=size,
            device="cpu",
            max_context=1024,
            tree=frspec.Tree.parse(tree),
        )
        for number in range(index, PROMPTS, len(SETTINGS)):
            for sampling in samplings:
                plain, drafted = (
                    generator.generate(
                        prompts[number], max_new_tokens=new_tokens, method=method, **sampling
                    )
                    for method in ("plain", "eagle2")
                )
                assert drafted.token_ids == plain.token_ids, f"prompt {number}, {sampling}"
                assert drafted.text == plain.text
                accepted += drafted.accept_lengths
    assert max(accepted) > 1


def test_smollm2_writes_the_same_text(smollm2):
    check_same_text(smollm2, DRAFTER, RANKING, new_tokens=16)


def test_qwen_writes_the_same_text(tmp_path):
    folder = os.environ.get("FRSPEC_QWEN_DIR")
    if not folder:
        pytest.skip("FRSPEC_QWEN_DIR names no model folder")
    if not QWEN_DRAFTER.is_dir():
        pytest.skip(f"{QWEN_DRAFTER} is absent")
    from frspec.ranking import Ranking

    tokenizer = Tokenizer.load(folder)
    # Low ids are the frequent ones of a BPE tokenizer: good enough to rank by.
    counts = np.arange(tokenizer.vocab_size, 0, -1, dtype=np.int64)
    ranking = Ranking.from_counts(
        counts,
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus="ids",
        special_ids=tokenizer.ending_ids,
    )
    ranking.save(tmp_path / "ranking.safetensors")
    check_same_text(Path(folder), QWEN_DRAFTER, tmp_path / "ranking.safetensors", new_tokens=8)
