"""Medusa heads (the layout of FasterDecoding/Medusa) as a drafter folder.

The drafter folder has config.json and model.safetensors with, for each head h, its residual blocks
h.N.linear.weight [d, d] and h.N.linear.bias, and its LM head h.L.weight [v, d], L being the number
of blocks. A checkpoint holds the heads alone, or under "medusa_head." beside the model that was
trained with them.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from frspec.convert.huggingface import own_dtype
from frspec.convert.layout import check_target, config_count, read_config, select
from frspec.convert.output import Progress, staged_folder, write_json, write_weights
from frspec.convert.tensors import WEIGHT_DTYPES, LazyTensor, has_float64
from frspec.convert.weights import Checkpoint
from frspec.errors import ConversionError

_WHOLE_MODEL_PREFIX = "medusa_head."
_MAX_HEADS = 32  # the deepest tree of the runtime


def is_medusa(tensors: dict[str, LazyTensor]) -> bool:
    """Whether Medusa heads are among these tensors."""
    first = re.compile(r"(medusa_head\.)?0\.\d+(\.linear)?\.weight")
    return any(first.fullmatch(name) for name in tensors)


def has_whole_model(tensors: dict[str, LazyTensor]) -> bool:
    """Whether the heads are part of a whole model's checkpoint."""
    return any(not name.startswith(_WHOLE_MODEL_PREFIX) for name in tensors) and any(
        name.startswith(_WHOLE_MODEL_PREFIX) for name in tensors
    )


def without_heads(checkpoint: Checkpoint) -> Checkpoint:
    """The model of a whole model's checkpoint."""
    kept = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not name.startswith(_WHOLE_MODEL_PREFIX)
    }
    return dataclasses.replace(checkpoint, tensors=kept)


def loads_as_it_is(checkpoint: Checkpoint) -> bool:
    """Whether the runtime reads these heads without conversion."""
    path = checkpoint.folder / "config.json"
    if checkpoint.kind != "safetensors" or not path.is_file() or has_float64(checkpoint.tensors):
        return False
    config = read_config(path)
    heads, layers = _count(_heads(checkpoint.tensors))
    claimed = config.get("medusa_num_heads")
    return (
        type(claimed) is int
        and 1 <= claimed <= heads
        and config.get("medusa_num_layers", 1) == layers
    )


def convert_medusa(
    checkpoint: Checkpoint,
    out: Path,
    target: Path | None,
    dtype: str | None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes the heads of `checkpoint` as the drafter folder `out`; returns notes for the user.

    `target` is the folder of the model they draft for: hidden size and vocabulary are compared.
    """
    where = checkpoint.folder
    config = read_config(where / "config.json")
    found = _heads(checkpoint.tensors)
    heads, layers = _count(found)
    claimed_layers = config.get("medusa_num_layers", layers)
    if claimed_layers != layers:
        raise ConversionError(
            f"{where}: expected medusa_num_layers residual blocks in a head, {claimed_layers}, "
            f"found {layers}"
        )
    sizes = _sizes(found, layers, where)
    notes: list[str] = []
    claimed = config_count(config, "medusa_num_heads", where, heads)
    if claimed > heads:
        raise ConversionError(
            f"{where}: expected medusa_num_heads heads, {claimed}, found {heads}: there is no "
            f"tensor {heads}.{layers}.weight"
        )
    if claimed < heads:
        notes.append(f"the config claims {claimed} heads; all {heads} of the checkpoint are kept")
    if heads > _MAX_HEADS:
        raise ConversionError(f"{where}: expected at most {_MAX_HEADS} heads, found {heads}")
    if target is not None:
        check_target(sizes, where, target)
    tensors = select(found, _shapes(heads, layers, sizes), set(), where)
    code, torch_name = WEIGHT_DTYPES[dtype or own_dtype(tensors)]
    tensors = [tensor.cast(code) for tensor in tensors]
    written = {
        "architectures": ["MedusaModel"],
        "medusa_num_heads": heads,
        "medusa_num_layers": layers,
        **sizes,
        "torch_dtype": torch_name,
    }
    if isinstance(config.get("base_model_name_or_path"), str):
        written["base_model_name_or_path"] = config["base_model_name_or_path"]
    with staged_folder(out, sum(tensor.nbytes for tensor in tensors)) as stage:
        write_json(stage / "config.json", written)
        write_weights(stage, tensors, progress)
    return notes


def _heads(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The heads' tensors by their names in a checkpoint of heads alone."""
    prefix = _WHOLE_MODEL_PREFIX
    if not any(name.startswith(prefix) for name in tensors):
        return tensors
    return {
        name.removeprefix(prefix): tensor.renamed(name.removeprefix(prefix))
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _count(found: dict[str, LazyTensor]) -> tuple[int, int]:
    """Heads, and residual blocks of each."""
    layers = heads = 0
    while f"0.{layers}.linear.weight" in found:
        layers += 1
    while f"{heads}.{layers}.weight" in found:
        heads += 1
    return heads, layers


def _sizes(found: dict[str, LazyTensor], layers: int, where: Path) -> dict[str, int]:
    name = f"0.{layers}.weight"
    if name not in found:
        raise ConversionError(
            f"{where}: tensor {name}: expected the LM head of the first head, found none"
        )
    shape = found[name].shape
    if len(shape) != 2:
        raise ConversionError(
            f"{where}: tensor {name}: expected two dimensions, found shape {list(shape)}"
        )
    return {"hidden_size": shape[1], "vocab_size": shape[0]}


def _shapes(heads: int, layers: int, sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    hidden, vocab = sizes["hidden_size"], sizes["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}
    for head in range(heads):
        for layer in range(layers):
            shapes[f"{head}.{layer}.linear.weight"] = (hidden, hidden)
            shapes[f"{head}.{layer}.linear.bias"] = (hidden,)
        shapes[f"{head}.{layers}.weight"] = (vocab, hidden)
    return shapes
