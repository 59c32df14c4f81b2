"""The commands as a user runs them: what they print where, and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import frspec
from command_line import FRSPEC, environment, run_frspec, write_talking_model
from frspec import Generator, RequestError, _core
from frspec.cli import _COMMANDS
from frspec.console import write_table
from frspec.options import _byte_count
from reference import tiny

MODEL = tiny.FAMILIES["llama3"].with_(name="talking", tokenizer=True)
# Long enough that nobody waits for its end.
ENDLESS = MODEL.with_(name="endless", max_position=200_000)

RESULT_KEYS = {
    "text", "token_ids", "prompt_tokens", "finish_reason", "accept_lengths", "timings", "device",
    "method",
}  # fmt: skip
TIMING_KEYS = {"load_s", "prefill_s", "decode_s", "draft_s", "verify_s", "tokens_per_s"}


@dataclass(frozen=True)
class Files:
    model: Path
    drafter: Path
    ranking: Path
    endless: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory, ranking_writer) -> Files:
    root = tmp_path_factory.mktemp("talking")
    model = write_talking_model(root / "model", MODEL)
    drafter = tiny.write_drafter(root / "drafter", MODEL, model, tiny.TinyDrafter(noise=0))
    order = tiny.frequent_tokens(tiny.Llama.load(model))
    ranking = root / "ranking.safetensors"
    ranking_writer(ranking, order, tiny.tokenizer_fingerprint(MODEL))
    return Files(model, drafter, ranking, write_talking_model(root / "endless", ENDLESS))


def drafting(files: Files) -> list[object]:
    return ["--drafter", files.drafter, "--ranking", files.ranking, "--vocab-size", 128]


def test_text_goes_to_stdout_and_the_summary_to_stderr(files) -> None:
    done = run_frspec(
        "generate", "--model", files.model, *drafting(files), "--prompt", "w7 w8",
        "--max-new-tokens", 20,
    )  # fmt: skip
    assert done.returncode == 0
    generator = Generator(files.model)
    expected = generator.generate([{"role": "user", "content": "w7 w8"}], max_new_tokens=20)
    assert done.stdout == expected.text + "\n"
    assert len(expected.token_ids) == 20
    assert re.fullmatch(
        r"20 tokens, [\d.]+ tokens/s, accept length [\d.]+, eagle2 on cpu, length\n", done.stderr
    )


def test_json_result(files) -> None:
    common = ["generate", "--model", files.model, "--prompt", "w7", "--raw", "--json"]
    common += ["--max-new-tokens", 24, "--temperature", 1, "--seed", 3]
    plain, drafted = run_frspec(*common), run_frspec(*common, *drafting(files))
    assert plain.returncode == drafted.returncode == 0
    assert plain.stderr == drafted.stderr == ""
    assert plain.stdout.count("\n") == 1
    results = [json.loads(done.stdout) for done in (plain, drafted)]
    for result, method in zip(results, ("plain", "eagle2"), strict=True):
        assert result.keys() >= RESULT_KEYS
        assert result["timings"].keys() >= TIMING_KEYS
        assert all(type(seconds) is float for seconds in result["timings"].values())
        assert result["prompt_tokens"] == 1
        assert (result["finish_reason"], result["method"]) == ("length", method)
        assert result["device"] == "cpu"
        assert sum(result["accept_lengths"]) == len(result["token_ids"]) - 1 == 23
    assert results[0]["token_ids"] == results[1]["token_ids"]
    assert results[0]["text"] == results[1]["text"]


@pytest.mark.parametrize("content", ["[5, 6, 7]", "5 6\n7", "5,6, 7\n"])
def test_token_ids_from_a_file(files, tmp_path, content) -> None:
    (tmp_path / "ids").write_text(content)
    common = ["generate", "--model", files.model, "--json", "--max-new-tokens", 8]
    by_ids = json.loads(run_frspec(*common, "--token-ids", tmp_path / "ids").stdout)
    by_text = json.loads(run_frspec(*common, "--raw", "--prompt", "w5 w6 w7").stdout)
    assert by_ids["prompt_tokens"] == 3
    assert by_ids["token_ids"] == by_text["token_ids"]


def test_prompt_from_stdin_loses_one_newline(files) -> None:
    common = ["generate", "--model", files.model, "--json", "--max-new-tokens", 8, "--raw"]
    piped = json.loads(run_frspec(*common, "--prompt-file", "-", stdin="w5 w6\n").stdout)
    given = json.loads(run_frspec(*common, "--prompt", "w5 w6").stdout)
    assert piped["prompt_tokens"] == 2
    assert piped["token_ids"] == given["token_ids"]


def test_stop_string_and_quiet(files) -> None:
    common = ["generate", "--model", files.model, "--prompt", "w7", "--max-new-tokens", 20]
    words = run_frspec(*common).stdout.split()
    stop = words[5]
    done = run_frspec(*common, "--stop", f" {stop}", "--quiet")
    assert done.stdout.split() == words[: words.index(stop)]
    assert done.stderr == ""


def test_model_without_a_tokenizer_prints_token_ids(tiny_models, tmp_path) -> None:
    folder, _ = tiny_models.target(tiny.FAMILIES["qwen2"])
    (tmp_path / "ids").write_text("1 2 3")
    args = ["generate", "--model", folder, "--token-ids", tmp_path / "ids", "--max-new-tokens", 6]
    printed = run_frspec(*args)
    assert printed.returncode == 0
    ids = json.loads(run_frspec(*args, "--json").stdout)["token_ids"]
    assert [int(word) for word in printed.stdout.split()] == ids
    assert len(ids) == 6


def test_tree_options_reach_the_engine(files) -> None:
    common = ["generate", "--model", files.model, "--drafter", files.drafter, "--prompt", "w7"]
    common += ["--json", "--max-new-tokens", 40]
    chain = json.loads(run_frspec(*common, "--tree-tokens", 1).stdout)
    deep = ["--tree-depth", 6, "--tree-topk", 4, "--tree-tokens", 32]
    flat = json.loads(run_frspec(*common, *deep, "--tree-depth", 1).stdout)
    sure = json.loads(run_frspec(*common, *deep, "--tree-min-probability", 0.9999).stdout)
    deep = json.loads(run_frspec(*common, *deep, "--tree-min-probability", 0).stdout)
    assert set(chain["accept_lengths"]) == {1}
    assert max(flat["accept_lengths"]) == 2 < max(deep["accept_lengths"])
    assert len(sure["accept_lengths"]) > len(flat["accept_lengths"])
    assert chain["token_ids"] == flat["token_ids"] == sure["token_ids"] == deep["token_ids"]


def test_ctrl_c_ends_a_generation(files) -> None:
    args = [*FRSPEC, "generate", "--model", str(files.endless), "--prompt", "w7"]
    args += ["--max-context", "200000", "--max-new-tokens", "190000"]
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        first = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    words = (first + stdout).decode().split()
    assert words and all(re.fullmatch(r"w\d+", word) for word in words)
    assert stdout.endswith(b"\n")
    assert re.fullmatch(r"\d+ tokens?, .*plain on cpu, cancelled\n", stderr.decode())


def test_closed_pipe_ends_quietly(files) -> None:
    args = [*FRSPEC, "generate", "--model", str(files.endless), "--prompt", "w7"]
    args += ["--max-context", "200000", "--max-new-tokens", "190000"]
    with subprocess.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 141


def test_chat_remembers_resets_and_ends(files) -> None:
    args = ["chat", "--model", files.model, *drafting(files), "--max-new-tokens", 5, "--quiet"]
    stdin = "w10 w11\nw12\n/reset\nw10 w11\n\n/nonsense\n/quit\nw13\n"
    done = run_frspec(*args, stdin=stdin)
    assert done.returncode == 0
    first, second, again = done.stdout.splitlines()

    generator = Generator(files.model)
    user = [{"role": "user", "content": "w10 w11"}]
    assert first == again == generator.generate(user, max_new_tokens=5).text
    talk = [*user, {"role": "assistant", "content": first}, {"role": "user", "content": "w12"}]
    assert second == generator.generate(talk, max_new_tokens=5).text
    assert done.stderr == "frspec: error: unknown command /nonsense; /help\n"


def test_chat_survives_a_full_context(files) -> None:
    args = ["chat", "--model", files.model, "--max-context", 16, "--max-new-tokens", 4, "--quiet"]
    done = run_frspec(*args, stdin="w1 w2\n" + "w3 " * 40 + "\n/reset\nw1 w2\n")
    assert done.returncode == 2  # which tells a script; in a terminal it would be 0
    first, again = done.stdout.splitlines()
    assert first == again
    (error,) = done.stderr.splitlines()
    assert error.startswith("frspec: error: ")
    assert "at most 15 are possible; /reset begins anew" in error


@pytest.mark.parametrize("option", [["--temperature", -1], ["--max-context", 3]])
def test_a_chat_that_is_piped_tells_of_errors_at_its_end(files, option) -> None:
    done = run_frspec("chat", "--model", files.model, *option, stdin="w1 w2 w3 w4\n")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("frspec: error: ") and done.stderr.count("\n") == 1


def test_an_empty_prompt_is_refused(files) -> None:
    generator = Generator(files.model)
    for prompt in ("", [], [{}]):
        with pytest.raises(RequestError):
            generator.generate(prompt)


def test_paths_that_are_not_utf_8(files, tmp_path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff"
    os.symlink(files.model, odd)
    for command in (
        ["generate", "--prompt", "w1", "--model", odd],
        ["generate", "--prompt", "w1", "--model", files.model, "--drafter", odd],
        ["info", "--model", odd],
        ["info", "--model", files.model, "--ranking", odd, "--vocab-size", "128"],
        ["rank-tokens", "--tokenizer", files.model, "--input", odd, "--out", tmp_path / "r"],
    ):
        done = subprocess.run([*FRSPEC, *command], capture_output=True, env=environment())
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(b"frspec: error: expected ") and b"udcff" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_ctrl_c_in_a_chat_ends_the_answer_only(files) -> None:
    import pty

    ours, theirs = pty.openpty()
    args = [*FRSPEC, "chat", "--model", str(files.endless)]
    args += ["--max-context", "200000", "--max-new-tokens", "190000"]
    with subprocess.Popen(
        args, stdin=theirs, stdout=theirs, stderr=theirs, env=environment({"TERM": "dumb"})
    ) as process:
        os.close(theirs)
        screen = Screen(ours)
        screen.wait_for("> ")
        os.write(ours, b"w7 w8\n")
        screen.wait_for("w7 w8")  # the echo
        screen.wait_for(" w")
        process.send_signal(signal.SIGINT)
        screen.wait_for("cancelled")
        screen.wait_for("> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=60) == 0
    os.close(ours)


class Screen:
    """What a program wrote to a pseudo-terminal; each wait looks behind what the last one found."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._text = ""

    def wait_for(self, text: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while text not in self._text:
            assert time.monotonic() < end, f"{text!r} did not appear; the end: {self._text[-200:]}"
            self._text += os.read(self._descriptor, 4096).decode(errors="replace")
        self._text = self._text.split(text, 1)[1]


def test_info_plans_without_loading(files) -> None:
    args = ["info", "--model", files.model, *drafting(files), "--max-context", 512]
    facts = json.loads(run_frspec(*args, "--json").stdout)
    assert facts["model"] == {
        "architecture": "LlamaForCausalLM",
        "layers": MODEL.layers,
        "hidden_size": MODEL.hidden,
        "attention_heads": MODEL.heads,
        "key_value_heads": MODEL.kv_heads,
        "vocab_size": MODEL.vocab,
        "dtype": "fp32",
        "step_bytes": facts["model"]["step_bytes"],
        "draft_vocab_size": 128,
    }
    assert facts["model"]["step_bytes"] > 0
    memory = facts["memory"]
    generator = Generator(
        files.model, files.drafter, files.ranking, vocab_size=128, max_context=512
    )
    assert memory["plan"] == generator.memory_plan
    assert memory["total_bytes"] == sum(generator.memory_plan.values())
    assert (memory["max_context"], memory["device"], memory["fits"]) == (512, "cpu", True)

    table = run_frspec(*args)
    assert table.returncode == 0
    assert f"{memory['total_bytes']:,}" in table.stdout
    assert "context of 512 tokens" in table.stdout
    assert "\x1b" not in table.stdout and "│" not in table.stdout


@pytest.mark.parametrize("command", ["generate", "demo", "eval"])
def test_help_tells_the_default_tree(command) -> None:
    text = " ".join(run_frspec(command, "--help", env={"COLUMNS": "80"}).stdout.split())
    depth, topk, tokens, least = _core.default_tree("cpu")
    for size in (depth, topk, tokens):
        assert f"default: {size} on a CPU" in text
    assert f"default: {least} on a CPU" in text


def test_info_where_a_config_leaves_out_what_has_a_default(tmp_path) -> None:
    folder = write_talking_model(tmp_path / "model", MODEL.with_(kv_heads=MODEL.heads))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": None}))
    facts = json.loads(run_frspec("info", "--model", folder, "--json").stdout)
    assert facts["model"]["key_value_heads"] == MODEL.heads


def test_a_ranking_in_the_home_folder(files) -> None:
    args = ["info", "--model", files.model, "--drafter", files.drafter, "--vocab-size", 128]
    home = {"HOME": str(files.ranking.parent)}
    done = run_frspec(*args, "--ranking", f"~/{files.ranking.name}", "--json", env=home)
    assert json.loads(done.stdout)["model"]["draft_vocab_size"] == 128


def test_info_tells_what_does_not_fit(files) -> None:
    done = run_frspec("info", "--model", files.model, "--memory-limit", "100kB")
    assert done.returncode == 0
    assert "does not fit into the 100,000 bytes available" in done.stdout


def test_info_about_the_build() -> None:
    done = run_frspec("info", "--json")
    build = json.loads(done.stdout)["build"]
    cpu, cuda = build["devices"]
    assert cpu["name"] == "cpu" and cpu["available"] and cpu["available_bytes"] > 0
    assert "threads" in cpu["description"]
    assert cuda["name"] == "cuda"
    if build["cuda"].startswith("none: "):  # and why
        assert not cuda["available"]
        assert (
            cuda["description"] == f"this build has no CUDA: {build['cuda'].removeprefix('none: ')}"
        )
    else:
        assert re.match(r"CUDA \d+\.\d+, kernels for compute capabilities \w+", build["cuda"])
        assert cuda["available"] or re.search("driver|GPU|capability", cuda["description"])
    assert build["cuda"] in run_frspec("info").stdout


@pytest.mark.parametrize("command", [*(name for name, *_ in _COMMANDS), None])
def test_help(command) -> None:
    done = run_frspec(*([command] if command else []), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: frspec {command or ''}".rstrip())
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_version() -> None:
    text = run_frspec("--version").stdout
    assert re.fullmatch(r"frspec \S.*\n", text)
    assert text == f"frspec {frspec.__version__}\n"
    with pytest.raises(AttributeError, match="no attribute 'versions'"):
        _ = frspec.versions
    done = subprocess.run([sys.executable, "-m", "frspec", "--version"], capture_output=True)
    assert done.stdout.decode() == text


COLUMNS = ["text", "tokens", "B - A, points"]
ROWS = [["a-name-of-no-use-at-all.jsonl, another.jsonl", "27,123,456", "-7.03"]]


def table(monkeypatch, capsys, width: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    write_table("Title", COLUMNS, ROWS)
    title, *lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert title == "Title"
    return lines


@pytest.mark.parametrize("width", [100, 80, 60, 45, 38, 37, 10])
def test_figures_of_a_table_stay_whole(monkeypatch, capsys, width) -> None:
    lines = table(monkeypatch, capsys, width)
    (row,) = (line for line in lines if "27,123,456" in line)
    assert "-7.03" in row
    if width < 38:  # lines would leave words less than 12 columns
        assert row.split() == [*ROWS[0][0].split(), *ROWS[0][1:]]
    else:
        assert lines[0][0] == "╭" and {len(line) for line in lines} <= {max(map(len, lines))}
        assert len(lines[0]) <= width
        words = "".join(line.split("│")[1] for line in lines if "│" in line and "text" not in line)
        assert words.replace(" ", "") == ROWS[0][0].replace(" ", "")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000", 1000), ("7 B", 7), ("2GB", 2_000_000_000), ("512MiB", 512 << 20),
        ("1.5gib", 3 << 29), ("3kb", 3000), ("1TiB", 1 << 40),
    ],
)  # fmt: skip
def test_byte_counts(text, count) -> None:
    assert _byte_count(text) == count
