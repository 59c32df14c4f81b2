"""What tells two models or two files apart without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..errors import EvaluationError

_BLOCKS, _BLOCK_BYTES = 64, 1 << 16
# Files of a model folder that decide what it writes.
_PATTERNS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "*.safetensors",
)  # fmt: skip


def folder_fingerprint(folder: Path) -> str:
    """SHA-256, first 16 hexadecimal digits, over names, sizes and samples of a model's files."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)}):
        _add(digest, path)
    return digest.hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """The same for one file; its name does not count."""
    digest = hashlib.sha256()
    _add(digest, path, name="")
    return digest.hexdigest()[:16]


def _add(digest, path: Path, name: str | None = None) -> None:
    """Small files whole; of large ones 64 blocks of 64 KiB, evenly spread, both ends among them."""
    try:
        size = path.stat().st_size
        digest.update(f"{path.name if name is None else name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _BLOCKS * _BLOCK_BYTES:
                digest.update(file.read())
                return
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from None
