"""Weights from anywhere: turns a checkpoint into a folder that the runtime loads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from frspec.convert.command import add_arguments, run
from frspec.convert.output import Progress, check_destination
from frspec.convert.tensors import weight_dtype_word
from frspec.errors import ConversionError
from frspec.files import user_path

__all__ = ["add_arguments", "convert", "run"]

_logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    target: str | Path | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    force: bool = False,
) -> Path:
    """Writes the checkpoint `source` as the folder `out` and returns the folder to load.

    `source` is a GGUF file, a folder or file of PyTorch weights, an EAGLE or Medusa checkpoint, a
    Hugging Face folder, or the hub id of safetensors or PyTorch weights. A folder that loads as it
    is is not copied: it is returned itself, and `note` says so (unless `dtype` asks for other
    weights).

    target:   the model an EAGLE or Medusa checkpoint drafts for, a folder or hub id. Of a whole
              model with Medusa heads the heads are written if it is given, else the model.
    dtype:    "bf16", "fp16" or "fp32"; None keeps the checkpoint's (bf16 for a quantised one).
    progress: called with bytes written, bytes in all, and the tensor's name.
    note:     called with remarks for the user; they are logged when it is None.
    force:    replaces a model folder at `out`, which else has to be new or empty.

    Raises ConversionError, ModelError, HubError or another FrspecError; `out` is then as it was
    before.
    """
    # The readers import the gguf and tokenizers packages, which `frspec --help` need not wait for.
    from frspec.convert import medusa
    from frspec.convert.eagle import convert_eagle, is_eagle, loads_as_it_is
    from frspec.convert.gguf_model import convert_gguf
    from frspec.convert.huggingface import convert_huggingface
    from frspec.convert.layout import check_loads, check_target, read_config
    from frspec.convert.weights import open_checkpoint

    if note is None:
        note = _logger.warning
    out = user_path(out)
    word = None if dtype is None else weight_dtype_word(dtype)
    folder_or_file = _local(source)
    target_folder = None if target is None else _local(target)
    gguf = _gguf_file(folder_or_file)
    checkpoint = None if gguf is not None else open_checkpoint(folder_or_file)
    eagle = checkpoint is not None and is_eagle(checkpoint.tensors)
    heads = checkpoint is not None and medusa.is_medusa(checkpoint.tensors)
    if target_folder is not None and not eagle and not heads:
        raise ConversionError(
            f"{source}: expected an EAGLE checkpoint (with fc.weight) or Medusa heads (with "
            "0.0.linear.weight) since a target is named, found another model"
        )
    if heads and target_folder is None and medusa.has_whole_model(checkpoint.tensors):
        note("the Medusa heads are left out: with --target they are converted, as a drafter")
        checkpoint, heads = medusa.without_heads(checkpoint), False
    # A file among others is not what its folder would load.
    whole = folder_or_file.is_dir() or _is_what_its_folder_loads(folder_or_file)
    as_it_is = medusa.loads_as_it_is if heads else loads_as_it_is
    if checkpoint is not None and word is None and whole and as_it_is(checkpoint):
        if not eagle and not heads:
            check_loads(checkpoint.folder)
        elif target_folder is not None:
            config = read_config(checkpoint.folder / "config.json")
            check_target(config, checkpoint.folder, target_folder)
        note(f"{checkpoint.folder} loads as it is: nothing to convert")
        return checkpoint.folder
    sources = [folder_or_file] + ([] if target_folder is None else [target_folder])
    check_destination(out, sources, force)
    if gguf is not None:
        notes = convert_gguf(gguf, out, word, progress)
    elif eagle:
        notes = convert_eagle(checkpoint, out, target_folder, word, progress)
    elif heads:
        notes = medusa.convert_medusa(checkpoint, out, target_folder, word, progress)
    else:
        notes = convert_huggingface(checkpoint, out, word, progress)
    for text in notes:
        note(text)
    return out


def _local(source: str | Path) -> Path:
    """`source` on this machine: a file or folder, or what the hub has under the id."""
    from frspec.hub import looks_like_hub_id, resolve

    if not str(source):
        raise ConversionError("expected a file, folder or hub id to convert, found none")
    path = user_path(source)
    if path.exists():
        return path
    if isinstance(source, Path) or not looks_like_hub_id(source):
        raise ConversionError(f"{path}: no such file or folder (a hub id reads owner/name)")
    folder = resolve(source, "model")
    if any(folder.glob("*.safetensors")):
        return folder
    return resolve(source, "torch")  # weights in PyTorch's files only


def _is_what_its_folder_loads(file: Path) -> bool:
    from frspec.convert.weights import weights_file

    try:
        return weights_file(file.parent) == file
    except ConversionError:  # several files, without an index
        return False


def _gguf_file(source: Path) -> Path | None:
    """The GGUF file that `source` is, or that is the only model in the folder `source`."""
    if source.is_dir():
        if (source / "config.json").exists():
            return None
        files = sorted(source.glob("*.gguf"))
        if len(files) > 1:
            raise ConversionError(f"{source}: expected one GGUF file, found {len(files)}; name one")
        return files[0] if files else None
    try:
        with open(source, "rb") as file:
            return source if source.suffix == ".gguf" or file.read(4) == b"GGUF" else None
    except OSError as error:
        raise ConversionError(f"{source}: cannot read: {error.strerror}") from error
