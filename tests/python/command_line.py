"""Running `frspec` as a user does, and a tiny model to talk with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from reference import tiny

FRSPEC = [sys.executable, "-m", "frspec.cli"]

# Words are w0, w1, ...: the roles are among them, so that a conversation has tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'w1' if message.role == 'user' else 'w2' }} {{ message.content }} w3 "
    "{% endfor %}"
    "{% if add_generation_prompt %}w2 {% endif %}"
)


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with Python's own encoding whatever the locale is."""
    return os.environ | {"PYTHONUTF8": "1", "COLUMNS": "100"} | dict(changes or {})


def run_frspec(
    *args: object, stdin: str = "", env: Mapping[str, str] | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end."""
    return subprocess.run(
        [*FRSPEC, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment(env),
        timeout=timeout,
    )


def write_talking_model(folder: Path, model: tiny.TinyModel) -> Path:
    """A tiny model with a tokenizer and a chat template."""
    tiny.write_model(folder, model)
    settings = {"chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_synthetic_model(folder: Path, **changes: object) -> Path:
    """A folder of `frspec make-synthetic` for tiny sizes; changes: of its config.json."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
    }
    source = folder / "config.json"
    source.write_text(json.dumps(config | changes))
    done = run_frspec("make-synthetic", "--config", source, folder / "model")
    assert done.returncode == 0, done.stderr
    return folder / "model"


def built_tool(name: str) -> Path:
    """A C++ program of this project that tools/test.sh has built, named by an environment variable
    such as FRSPEC_BENCH; else the one of build/tests, or the test is skipped."""
    variable = name.upper().replace("-", "_")
    variable = variable if variable.startswith("FRSPEC") else f"FRSPEC_{variable}"
    if variable in os.environ:
        return Path(os.environ[variable])
    path = Path(__file__).parents[2] / "build" / "tests" / name
    if not path.exists():
        pytest.skip(f"{path} is not built; {variable} names another")
    return path
