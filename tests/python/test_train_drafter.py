"""Training drafters (tools/train_drafter.py) for tiny targets, end to end into frspec.

Optional: runs where torch and transformers are installed (pip install 'frspec[train]').
"""

import errno
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import frspec
from command_line import write_talking_model
from frspec.tree import default_tree
from reference import tiny
from reference.eagle import Eagle as ReferenceEagle
from reference.llama import Llama
from reference.medusa import Medusa as ReferenceMedusa

torch = pytest.importorskip("torch", reason="torch is not installed (training is optional)")
pytest.importorskip("transformers", reason="transformers is not installed")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import train_drafter  # noqa: E402
from drafter_training import features, training  # noqa: E402
from drafter_training.conversations import read_conversations, tokenize  # noqa: E402
from drafter_training.objective import Columns  # noqa: E402

MODEL = tiny.FAMILIES["llama3.2"].with_(vocab=512, tokenizer=True, dtype="bfloat16")


def run(monkeypatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["train_drafter.py", *map(str, args)])
    return train_drafter.main()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_talking_model(tmp_path_factory.mktemp("target"), MODEL)


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> Path:
    """The model's own answers, as ShareGPT has conversations."""
    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    generator = frspec.Generator(model)
    lines = []
    for number in range(150):
        question = f"w{number + 4} w{number * 3 % 300 + 4}"
        answer = generator.generate(
            [{"role": "user", "content": question}], max_new_tokens=24, temperature=1, seed=number
        )
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer.text}]
        lines.append(json.dumps({"conversations": turns}) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def cache(model, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        options = ["--model", model, "--data", data, "--tokens", 1e9, "--device", "cpu"]
        assert run(patch, "features", folder, *options) == 0
    return folder


def test_conversations_are_encoded_as_prompts_are(model, data) -> None:
    tokenizer = frspec.tokenizer.Tokenizer.load(model)
    messages = next(read_conversations(data))
    sequence = tokenize(tokenizer, messages, 1000)
    prompt = tokenizer.encode(tokenizer.chat(messages[:1]), add_special_tokens=False)
    assert sequence.tokens[: len(prompt)].tolist() == prompt
    assert not sequence.written[: len(prompt)].any()
    assert sequence.written[len(prompt) :].all() and len(sequence.tokens) > len(prompt)
    assert len(tokenize(tokenizer, messages, len(prompt) + 2).tokens) == len(prompt) + 2
    assert tokenize(tokenizer, messages[:1], 1000) is None


def test_features_are_those_of_the_reference(model, cache) -> None:
    llama = Llama.load(model)
    found = features.Cache(cache)
    batch = found.batch([0, 5], "cpu")
    for row, index in enumerate([0, 5]):
        n = found.lengths[index]
        logits, hidden = llama.forward(batch["tokens"][row, :n].numpy())
        error = batch["features"][row, :n].float().numpy() - hidden
        assert np.abs(error).max() < 0.05 * hidden.std()  # computed in bf16
        taught = batch["top_probs"][row, :n].sum(-1).numpy() > 0
        assert taught.any() and not taught.all()
        probs = np.exp(logits - logits.max(1, keepdims=True))
        probs /= probs.sum(1, keepdims=True)
        ids = batch["top_ids"][row, :n].numpy()
        expected = np.take_along_axis(probs, ids, 1)[taught]
        assert np.abs(batch["top_probs"][row, :n].numpy()[taught] - expected).max() < 0.05
        assert not batch["top_probs"][row, n:].any()


def test_held_out_conversations_are_not_trained_on(cache) -> None:
    held_out = features.Cache(cache, held_out=True)
    trained = features.Cache(cache)
    conversations = [*read_conversations(*cache.glob("held-out-*.jsonl"))]
    assert len(conversations) == len(held_out.lengths) == 3
    assert len(trained.lengths) == 147


def test_what_is_asked_twice_is_held_out_together() -> None:
    ask = [[{"role": "user", "content": f"question {number}"}] for number in range(5000)]
    held = [features.holds_out(messages) for messages in ask]
    assert 70 < sum(held) < 130
    answered = [[*ask[n], {"role": "assistant", "content": str(n)}, *ask[0]] for n in range(5000)]
    assert [features.holds_out(messages) for messages in answered] == held


def exact_loss(head, hidden, ids, probs):
    """The objective in full: the K tokens on their own, everything else as one event."""
    log_q = (hidden @ head.T).log_softmax(1)
    known = log_q.gather(1, ids)
    rest = torch.log1p(-known.exp().sum(1))
    return (-(probs * known).sum(1) - (1 - probs.sum(1)) * rest).mean()


def test_objective() -> None:
    generator = torch.Generator().manual_seed(1)
    head = torch.randn(300, 16, generator=generator)
    hidden = 0.25 * torch.randn(40, 16, generator=generator)
    ids = torch.stack([torch.randperm(300, generator=generator)[:8] for _ in range(40)])
    probs = torch.rand(40, 8, generator=generator)
    probs = 0.9 * probs / probs.sum(1, keepdim=True)
    counts = torch.arange(300.0)
    exact = exact_loss(head, hidden, ids, probs)

    whole = Columns(head, counts, frequent=300, sampled=0)
    assert torch.allclose(whole.cross_entropy(hidden, ids, probs), exact, atol=1e-5)

    part = Columns(head, counts, frequent=100, sampled=50)
    assert part.frequent.tolist() == list(range(299, 199, -1))
    losses = []
    for _ in range(300):
        part.draw(generator)
        losses.append(part.cross_entropy(hidden, ids, probs).item())
    # The estimate of the sum is unbiased; its logarithm is a little too small.
    assert abs(np.mean(losses) - exact) < 0.05
    everything = Columns(head, counts, frequent=100, sampled=200)
    everything.draw(generator)
    assert torch.allclose(everything.cross_entropy(hidden, ids, probs), exact, atol=1e-5)


def train(monkeypatch, model, cache, kind, out, *options) -> int:
    return run(
        monkeypatch, kind, out, "--model", model, "--cache", cache, "--batch-tokens", 512,
        "--device", "cpu", *options,
    )  # fmt: skip


def read_report(folder: Path) -> dict:
    return json.loads((folder / "training.json").read_text())


def test_eagle_from_start_to_frspec(monkeypatch, model, cache, tmp_path, capsys) -> None:
    noisy = tiny.TinyDrafter(noise=0.6, fc_bias=True)
    options = ["--start-from", tiny.write_drafter(tmp_path / "noisy", MODEL, model, noisy)]
    start, out = tmp_path / "start", tmp_path / "drafter"
    assert train(monkeypatch, model, cache, "eagle", start, *options, "--epochs", 0) == 0
    options += ["--epochs", 20, "--learning-rate", 2e-3]
    assert train(monkeypatch, model, cache, "eagle", out, *options) == 0
    before, after = (read_report(folder)["held_out_agreement"] for folder in (start, out))
    assert sum(after) > sum(before) + 0.1 and len(after) == 2
    assert not (out / ".training.pt").exists()

    # PyTorch's forward pass is the one that the reference, and so frspec, runs.
    task = train_drafter.EagleTask(model, features.Cache(cache), settings(), start_from=out)
    batch = features.Cache(cache).batch([0], "cpu")
    hidden = batch["features"].float()
    with torch.no_grad():
        first, committed = task._forward(batch, hidden)
        guessed = torch.cat([hidden[:, :1], first], 1)
        second = task._forward(batch, guessed, committed)[0][0].numpy()
    eagle = ReferenceEagle.load(out, Llama.load(model))
    tokens, known = batch["tokens"][0, 1:].numpy(), hidden[0, :-1].double().numpy()
    n = len(tokens)
    expected = eagle.rows(tokens, known, np.arange(n), np.tri(n, dtype=bool))
    error = 1e-3 * np.abs(expected).max()
    assert np.abs(first[0].numpy() - expected).max() < error
    for end in (1, 2, n - 1):  # a row upon what the one before it predicted
        inputs = np.vstack([known[:end], expected[end - 1]])
        rows = np.arange(end + 1), np.tri(end + 1, dtype=bool)
        level = eagle.rows(tokens[: end + 1], inputs, *rows)[-1]
        assert np.abs(second[end] - level).max() < error

    capsys.readouterr()
    measure = ["measure", out, "--model", model, "--cache", cache]
    assert run(monkeypatch, *measure, "--tree", "3x4x12@0.02") == 0
    report = read_report(out)["held_out_accept_length"]["3x4x12@0.02"]
    assert report["accept_length"] > 1
    assert f"accept length {report['accept_length']:.3f}" in capsys.readouterr().out


def test_medusa_from_start_to_frspec(monkeypatch, model, cache, tmp_path) -> None:
    options = ["--heads", 2, "--frequent", 256]
    start, out = tmp_path / "start", tmp_path / "heads"
    assert train(monkeypatch, model, cache, "medusa", start, *options, "--epochs", 0) == 0
    more = ["--epochs", 30, "--learning-rate", 5e-3]
    assert train(monkeypatch, model, cache, "medusa", out, *options, *more) == 0
    before, after = (read_report(folder)["held_out_agreement"] for folder in (start, out))
    assert sum(after) > sum(before) and len(after) == 2
    assert run(monkeypatch, "measure", out, "--model", model, "--cache", cache) == 0
    assert read_report(out)["held_out_accept_length"][str(default_tree())]["accept_length"] > 1

    # What the trainer measures is what the checkpoint does.
    held_out = features.Cache(cache, held_out=True)
    heads = ReferenceMedusa.load(out, Llama.load(model))
    batch = held_out.batch([0], "cpu")
    taught = batch["top_probs"][0, 1:].sum(-1).numpy() > 0
    hidden = heads.hidden(0, batch["features"][0, :-1].double().numpy()[taught])
    best = (hidden @ heads.weights["0.1.weight"].T).argmax(1)
    task = train_drafter.MedusaTask(model, features.Cache(cache), settings(), heads=2)
    rows = torch.from_numpy(heads.weights["0.1.weight"])[task.columns.frequent]
    task.drafter.rows[0].data.copy_(rows)
    task.drafter.blocks[0].weight.data.copy_(torch.from_numpy(heads.weights["0.0.linear.weight"]))
    task.drafter.blocks[0].bias.data.copy_(torch.from_numpy(heads.weights["0.0.linear.bias"]))
    with torch.no_grad():
        hits = task.agreement(batch)[0][0].item()
    expected = (best == batch["top_ids"][0, 1:, 0].numpy()[taught]).sum()
    assert abs(hits - expected) <= 1  # logits in bf16: a near-tie may fall the other way


def settings(**changes) -> training.Settings:
    chosen = {
        "epochs": 2, "minutes": 0, "batch_tokens": 512, "learning_rate": 1e-3, "frequent": 256,
        "sampled": 64, "seed": 0, "device": "cpu",
    }  # fmt: skip
    return training.Settings(**chosen | changes)


def test_an_ended_run_goes_on(monkeypatch, model, cache, tmp_path) -> None:
    options = ["--epochs", 2, "--frequent", 128, "--sampled", 64]
    assert train(monkeypatch, model, cache, "eagle", tmp_path / "whole", *options) == 0
    monkeypatch.setattr(training.Run, "due", lambda run: True)
    step = training.Run.step
    steps = []

    def step_until_interrupted(run, batch, done):
        if len(steps) == 7:
            raise KeyboardInterrupt
        steps.append(done)
        return step(run, batch, done)

    monkeypatch.setattr(training.Run, "step", step_until_interrupted)
    assert train(monkeypatch, model, cache, "eagle", tmp_path / "ended", *options) == 130
    monkeypatch.setattr(training.Run, "step", step)
    other = [*options, "--seed", 1]
    assert train(monkeypatch, model, cache, "eagle", tmp_path / "ended", *other) == 2
    assert train(monkeypatch, model, cache, "eagle", tmp_path / "ended", *options) == 0
    whole, ended = (tmp_path / name / "model.safetensors" for name in ("whole", "ended"))
    assert whole.read_bytes() == ended.read_bytes()


def test_a_cache_goes_on(monkeypatch, model, data, cache, tmp_path) -> None:
    monkeypatch.setattr(features, "_PART_TOKENS", 1000)
    options = ["--model", model, "--data", data, "--device", "cpu"]
    assert run(monkeypatch, "features", tmp_path, *options, "--tokens", 1500) == 0
    some = features.Cache(tmp_path).tokens
    assert run(monkeypatch, "features", tmp_path, *options, "--tokens", 1e9) == 0
    assert features.Cache(cache).tokens == features.Cache(tmp_path).tokens > some >= 1000
    assert len(features.Cache(tmp_path, held_out=True).lengths) == 3
    assert run(monkeypatch, "features", tmp_path, *options, "--tokens", 9, "--max-tokens", 7) == 2


def test_own_answers(monkeypatch, model, data, tmp_path) -> None:
    model = shutil.copytree(model, tmp_path / "model")
    (model / "generation_config.json").write_text('{"repetition_penalty": 3.0}')  # not heeded
    out = tmp_path / "answers.jsonl"
    options = ["--model", model, "--questions", data, "--out", out, "--max-new-tokens", 5]
    options += ["--batch", 4, "--device", "cpu"]
    assert run(monkeypatch, "answers", *options, "--limit", 6) == 0
    first = out.read_text()
    out.write_text(first[:-9])  # as a killed run leaves it
    assert run(monkeypatch, "answers", *options, "--limit", 8) == 0
    assert out.read_text().startswith(first)
    answers = [*read_conversations(out)]
    assert len(answers) == 8 and answers[0][-1]["role"] == "assistant"
    asked = [answer[0]["content"] for answer in answers]
    assert len({*asked}) == 8 and asked == sorted(asked, key=lambda question: len(question.split()))
    # frspec rounds elsewhere than transformers does: a near-tie may fall otherwise.
    generator = frspec.Generator(model)
    same = sum(
        generator.generate(answer[:1], max_new_tokens=5).text == answer[-1]["content"]
        for answer in answers
    )
    assert same >= 6
    sampled = tmp_path / "sampled.jsonl"
    options[options.index(out)] = sampled
    assert run(monkeypatch, "answers", *options, "--limit", 8, "--temperature", 1) == 0
    whole = sampled.read_text()
    sampled.write_text("".join(whole.splitlines(keepends=True)[:5]))
    assert run(monkeypatch, "answers", *options, "--limit", 8, "--temperature", 1) == 0
    assert sampled.read_text() == whole != out.read_text()
    assert run(monkeypatch, "answers", *options, "--limit", 8, "--max-prompt-tokens", 2) == 2
    sampled.write_text("not an answer\n")
    assert run(monkeypatch, "answers", *options, "--limit", 8) == 2
    assert sampled.read_text() == "not an answer\n"
    options[options.index(sampled)] = tmp_path / "short.jsonl"
    assert run(monkeypatch, "answers", *options, "--max-prompt-tokens", 2) == 0
    assert (tmp_path / "short.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("[1]", "data.jsonl:2: expected an object with conversations"),
        ('{"text": "a"}', "data.jsonl:2: expected an object with conversations"),
        ('{"conversations": [{"from": "gpt"}]}', "data.jsonl:2: expected an object"),
        ("no JSON", "data.jsonl:2: expected an object"),
        (b"\xff", "data.jsonl:2: expected an object"),
    ],
)
def test_broken_data(monkeypatch, model, tmp_path, capsys, line, named) -> None:
    path = tmp_path / "data.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'{"conversations": []}\n' + line + b"\n")
    options = ["--model", model, "--data", path, "--tokens", 100, "--device", "cpu"]
    assert run(monkeypatch, "features", tmp_path / "cache", *options, "--strict") == 2
    assert named in capsys.readouterr().err
    assert run(monkeypatch, "features", tmp_path / "cache", *options) == 0
    err = capsys.readouterr().err
    assert "skipped a line without a conversation" in err and named in err


def test_full_disk(monkeypatch, model, data, tmp_path, capsys) -> None:
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(features, "write_whole", full)
    options = ["--model", model, "--data", data, "--tokens", 100, "--device", "cpu"]
    assert run(monkeypatch, "features", tmp_path / "cache", *options) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_refusals(monkeypatch, model, cache, tmp_path, capsys) -> None:
    assert train(monkeypatch, model, tmp_path, "eagle", tmp_path / "out") == 2
    assert "expected a cache" in capsys.readouterr().err
    save_file({"fc.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    options = ["--epochs", 0, "--start-from", tmp_path]
    assert train(monkeypatch, model, cache, "eagle", tmp_path / "out", *options) == 2
    assert "expected tensors" in capsys.readouterr().err
    options = ["--model", model, "--data", tmp_path / "none", "--tokens", 100, "--device", "cpu"]
    assert run(monkeypatch, "features", tmp_path / "new", *options) == 2
    assert "no such file of conversations" in capsys.readouterr().err
    assert math.isfinite(features.Cache(cache).tokens)
