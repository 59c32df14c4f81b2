"""Model folders and hub ids. A local HTTP server stands for the hub; nothing leaves the machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import frspec.hub
from frspec.errors import HubError, ModelError
from frspec.hub import looks_like_hub_id, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "README.md": b"read me",
    "onnx/model.safetensors": b"other weights",
}
TOKENIZER_FILES = {"config.json", "tokenizer.json", "chat_template.jinja"}


class Hub(BaseHTTPRequestHandler):
    """The few answers that listing and fetching a model take."""

    def do_GET(self):
        status = self.server.status
        path, _, _ = self.path.partition("?")
        if status == "hang":
            time.sleep(20)
        elif status != 200:
            self.answer(b"", status=status)
        elif path.startswith("/api/models/some/model/tree/"):
            tree = [self.entry(name) for name in FILES]
            self.answer(json.dumps(tree).encode(), type="application/json")
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"_id": "1", "id": "some/model", "sha": COMMIT, "siblings": siblings}
            self.answer(json.dumps(info).encode(), type="application/json")
        elif path.startswith(f"/some/model/resolve/{COMMIT}/"):
            data = FILES[path.split("/", 5)[5]]
            etag = hashlib.sha1(data).hexdigest()
            self.answer(data, **{"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
        else:
            self.answer(b"", status=404, **{"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    @staticmethod
    def entry(name):
        oid = hashlib.sha1(FILES[name]).hexdigest()
        return {"type": "file", "path": name, "size": len(FILES[name]), "oid": oid}

    def answer(self, data, status=200, type="application/octet-stream", **headers):
        self.send_response(status)
        self.send_header("Content-Type", type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.block_on_close = False
    server.status = 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


SCRIPT = """
import sys
import frspec.hub
frspec.hub.TIMEOUT_SECONDS = 2.0
try:
    print("folder", frspec.hub.resolve(sys.argv[1], files=sys.argv[2]))
except frspec.hub.HubError as error:
    print("error", error)
"""


def fetch(endpoint: str, cache: Path, model: str, files: str = "model") -> str:
    """resolve() in its own process, because huggingface_hub reads its settings when imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    source = str(Path(frspec.hub.__file__).parents[1])
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join([source, environment.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", SCRIPT, model, files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.rstrip("\n")


def url(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_existing_folder_is_returned(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    # A folder goes before a hub id of the same name.
    assert resolve("owner/name") == Path("owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    "model",
    [
        "/no/such/folder",
        "./owner/name",
        "../name",
        "~/none",
        "name",
        "a/b/c",
        "owner/",
        Path("a/b"),
    ],
)
def test_missing_path_is_a_model_error(model):
    with pytest.raises(ModelError, match="no such folder") as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_file_is_a_model_error(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="expected a model folder, found a file"):
        resolve(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "model", ["owner/na--me", "owner/name.git", "owner/na$me", "o/" + "n" * 120]
)
def test_bad_hub_id_is_refused_without_a_network(model):
    assert looks_like_hub_id(model)
    with pytest.raises(HubError, match="not a valid hub id") as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("model", TOKENIZER_FILES | {"model.safetensors"}),
        ("tokenizer", TOKENIZER_FILES),
        ("torch", TOKENIZER_FILES | {"model.safetensors", "pytorch_model.bin"}),
    ],
)
def test_only_the_files_needed_are_fetched(hub, tmp_path, files, expected):
    answer = fetch(url(hub), tmp_path, "some/model", files)
    assert answer.startswith("folder ")
    folder = Path(answer.removeprefix("folder "))
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == expected
    assert (folder / "config.json").read_bytes() == FILES["config.json"]


def test_complete_cached_copy_serves_without_a_network(hub, tmp_path):
    first = fetch(url(hub), tmp_path, "some/model")
    hub.status = 500
    assert fetch(url(hub), tmp_path, "some/model") == first
    assert fetch("http://127.0.0.1:9", tmp_path, "some/model") == first


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "has no such model"),
        (401, "has no such model (or it is private and HF_TOKEN is not set)"),
        (500, "500"),
        ("hang", "timed out"),
    ],
)
def test_failure_is_one_line_and_soon(hub, tmp_path, status, message):
    hub.status = status
    start = time.monotonic()
    answer = fetch(url(hub), tmp_path, "some/model")
    assert time.monotonic() - start < 30
    assert answer.startswith("error some/model: no such folder")
    assert message in answer
    assert url(hub) in answer
    assert "\n" not in answer


def test_no_network_is_one_line(tmp_path):
    answer = fetch("http://127.0.0.1:9", tmp_path, "some/model")
    assert answer.startswith("error some/model: no such folder, not in the Hugging Face cache")
    assert "http://127.0.0.1:9" in answer and "refused" in answer
    assert "\n" not in answer
