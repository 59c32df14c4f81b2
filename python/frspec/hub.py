"""What a user calls a model (a folder, or a Hugging Face id) as a folder on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

from .errors import HubError, ModelError, first_line
from .files import is_utf8, user_path

# Seconds to wait for the first answer of the hub: a network that swallows packets must not hang us.
TIMEOUT_SECONDS = 10.0

Files = Literal["model", "tokenizer", "torch"]

_TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model"]
_PATTERNS: dict[str, list[str]] = {
    "tokenizer": _TOKENIZER_FILES,
    "model": ["*.safetensors", *_TOKENIZER_FILES],
    "torch": ["*.safetensors", "*.bin", "*.pt", "*.pth", *_TOKENIZER_FILES],
}
# Only the top folder holds the model: subfolders repeat the weights in other formats.
_IGNORED = ["*/*"]

_HUB_ID = re.compile(r"[^/\\~.\s][^/\\\s]*/[^/\\\s]+")


def looks_like_hub_id(model: str) -> bool:
    """True for "owner/name": one slash, and not written like a path (./x, ~/x, /x)."""
    return _HUB_ID.fullmatch(model) is not None


def resolve(model: str | Path, files: Files = "model") -> Path:
    """Returns the folder of `model`.

    `model` is an existing folder, or, given as a string, a Hugging Face id "owner/name", which is
    fetched into the Hugging Face cache; without a network what is cached of it is used.
    `files` says what to fetch: "model" (safetensors, config, tokenizer), "tokenizer" (no weights)
    or "torch" (also PyTorch's .bin/.pt files, for conversion).

    Raises ModelError for a path that is no folder and HubError for an id that cannot be fetched.
    """
    if not isinstance(model, (str, os.PathLike)) or not str(model) or "\0" in str(model):
        raise ModelError(f"expected the path of a folder or a hub id, found {model!r:.60}")
    path = user_path(model)
    if not is_utf8(path):
        raise ModelError(f"expected a path in UTF-8, found {str(path)!r:.80}")
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise ModelError(f"{str(model)[:60]}: {error.strerror}") from None
    if is_folder:
        return path
    if path.exists():
        hint = f"; convert it first: frspec convert {path} OUT"
        convertible = path.suffix in (".gguf", ".bin", ".pt", ".pth")
        raise ModelError(
            f"{path}: expected a model folder, found a file{hint if convertible else ''}"
        )
    if isinstance(model, Path) or not looks_like_hub_id(model):
        raise ModelError(f"{path}: no such folder (and not a hub id, which reads owner/name)")
    return _fetch(model, files)


def _fetch(hub_id: str, files: Files) -> Path:
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(hub_id)
    except HFValidationError as error:
        raise HubError(
            f"{hub_id}: not a folder, and not a valid hub id: {first_line(error)}"
        ) from None

    options = {"allow_patterns": _PATTERNS[files], "ignore_patterns": _IGNORED}
    try:
        # Asked first because this call takes a timeout, and snapshot_download's first one does not.
        huggingface_hub.HfApi().model_info(hub_id, timeout=TIMEOUT_SECONDS)
        folder = huggingface_hub.snapshot_download(hub_id, **options)
    # huggingface_hub raises its own types, those of its HTTP library (which changed between its
    # versions) and plain OSError; all of them mean the same to the caller.
    except Exception as error:
        try:
            folder = huggingface_hub.snapshot_download(hub_id, local_files_only=True, **options)
        except Exception:
            raise HubError(_explain(hub_id, error)) from None
    return Path(folder)


def _explain(hub_id: str, error: Exception) -> str:
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError

    endpoint = _endpoint()
    if isinstance(error, GatedRepoError):
        return f"{hub_id}: gated on {endpoint}; accept its licence there and set HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return (
            f"{hub_id}: no such folder, and {endpoint} has no such model"
            " (or it is private and HF_TOKEN is not set)"
        )
    return (
        f"{hub_id}: no such folder, not in the Hugging Face cache,"
        f" and cannot be fetched from {endpoint}: {first_line(error)}"
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
