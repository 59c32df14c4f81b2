"""An EAGLE checkpoint (the layout of SafeAILab/EAGLE v1 and v2) as a drafter folder.

The drafter folder has config.json and model.safetensors with fc.weight [h, 2h], maybe fc.bias,
layers.N.* without an input norm in the first layer, and embed_tokens.weight only when it is not
the target's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from frspec.convert.huggingface import ROTARY_BUFFER, own_dtype
from frspec.convert.layout import (
    bias_settings,
    check_target,
    config_count,
    layer_shapes,
    read_config,
    select,
    with_classic_rope,
    with_torch_dtype,
)
from frspec.convert.output import Progress, staged_folder, write_json, write_weights
from frspec.convert.tensors import BLOCK_ELEMENTS, WEIGHT_DTYPES, LazyTensor, has_float64
from frspec.convert.weights import Checkpoint, open_checkpoint
from frspec.errors import ConversionError

_EMBEDDING = "embed_tokens.weight"
_HEAD = "lm_head.weight"
_EAGLE3 = ("midlayer.", "d2t", "t2d")


def is_eagle(tensors: dict[str, LazyTensor]) -> bool:
    """Whether these are a drafter's tensors: fc joins embedding and feature in no other model."""
    return "fc.weight" in tensors


def loads_as_it_is(checkpoint: Checkpoint) -> bool:
    """Whether the runtime reads this checkpoint, a model or a drafter, without conversion."""
    folder = checkpoint.folder
    if checkpoint.kind != "safetensors" or not (folder / "config.json").is_file():
        return False
    weights = {n: t for n, t in checkpoint.tensors.items() if not ROTARY_BUFFER.fullmatch(n)}
    if has_float64(weights):
        return False
    if not is_eagle(checkpoint.tensors):
        # Of a SentencePiece file alone conversion makes a tokenizer.json.
        return (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file()
    return all(
        re.fullmatch(r"fc\.(weight|bias)|layers\.\d+\..*", name)
        and not ROTARY_BUFFER.fullmatch(name)
        for name in checkpoint.tensors
    )


def convert_eagle(
    checkpoint: Checkpoint,
    out: Path,
    target: Path | None,
    dtype: str | None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes `checkpoint` as the drafter folder `out`; returns notes for the user.

    `target` is the folder of the model it drafts for: hidden size and vocabulary are compared,
    and the drafter's own embedding (and head) dropped when they hold the target's values.
    """
    where = checkpoint.folder
    found = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not ROTARY_BUFFER.fullmatch(name)
    }
    for name in found:
        if name.startswith(_EAGLE3):
            raise ConversionError(
                f"{where}: tensor {name}: expected an EAGLE v1 or v2 checkpoint, found EAGLE-3"
            )
    config = with_classic_rope(read_config(where / "config.json"))
    if "rope_parameters" in config or config.get("partial_rotary_factor", 1) != 1:
        raise ConversionError(
            f"{where / 'config.json'}: expected one RoPE over whole heads for all layers, found"
            f" {config.get('rope_parameters', config.get('partial_rotary_factor'))!r:.80}"
        )
    notes: list[str] = []
    found = _without_target_tables(found, config, where, target, notes)
    layers = 1 + max(
        (int(match[1]) for name in found if (match := re.match(r"layers\.(\d+)\.", name))),
        default=0,
    )
    if layers > 1024:
        raise ConversionError(f"{where}: expected at most 1024 layers, found layer {layers - 1}")
    tensors = select(found, _drafter_shapes(config, where, layers), {_EMBEDDING}, where)
    code, torch_name = WEIGHT_DTYPES[dtype or own_dtype(tensors)]
    tensors = [tensor.cast(code) for tensor in tensors]

    config = with_torch_dtype(config, torch_name)
    config.update(bias_settings(set(found), "layers.0.", where))
    config.update(num_hidden_layers=layers, bias="fc.bias" in found)
    with staged_folder(out, sum(tensor.nbytes for tensor in tensors)) as stage:
        write_json(stage / "config.json", config)
        write_weights(stage, tensors, progress)
    return notes


def _drafter_shapes(config: dict[str, Any], where: Path, layers: int) -> dict[str, tuple[int, ...]]:
    hidden = config_count(config, "hidden_size", where)
    shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, 2 * hidden), "fc.bias": (hidden,)}
    if isinstance(config.get("vocab_size"), int):
        shapes[_EMBEDDING] = (config["vocab_size"], hidden)
    for layer in range(layers):
        shapes.update(layer_shapes(f"layers.{layer}.", config, where))
    del shapes["layers.0.input_layernorm.weight"]
    return shapes


def _without_target_tables(
    found: dict[str, LazyTensor],
    config: dict[str, Any],
    where: Path,
    target: Path | None,
    notes: list[str],
) -> dict[str, LazyTensor]:
    """`found` without the embedding and head that the target has too."""
    if target is None:
        if _HEAD in found:
            raise ConversionError(
                f"{where}: tensor {_HEAD}: drafting uses the target's head; name the target so "
                "that the two can be compared"
            )
        if _EMBEDDING in found:
            notes.append("the drafter's embedding is kept: no target was named to compare it with")
        return found
    check_target(config, where, target)
    if not {_EMBEDDING, _HEAD} & found.keys():
        return found
    tables = open_checkpoint(target).tensors
    embedding = tables.get("model.embed_tokens.weight")
    if embedding is None:
        raise ConversionError(f"{target}: tensor model.embed_tokens.weight: expected, found none")
    kept = dict(found)
    if _EMBEDDING in kept:
        if _same_values(kept[_EMBEDDING], embedding):
            del kept[_EMBEDDING]
        else:
            notes.append("the drafter's embedding is kept: it differs from the target's")
    if _HEAD in kept:
        if not _same_values(kept.pop(_HEAD), tables.get(_HEAD, embedding)):
            raise ConversionError(
                f"{where}: tensor {_HEAD}: expected the target's values, found others; "
                "drafting uses the target's head"
            )
    return kept


def _same_values(ours: LazyTensor, theirs: LazyTensor) -> bool:
    """Whether one of two float tensors is the other, or the other rounded to its dtype.

    A checkpoint saved in fp16 whose target is in bf16 agrees only after rounding; either of the
    two may be the rounded one.
    """
    if ours.shape != theirs.shape:
        return False
    if ours.dtype == theirs.dtype:
        return _equal(ours, theirs)
    return any(
        wide.dtype != narrow.dtype and _rounds_to(wide, narrow)
        for wide, narrow in ((ours, theirs), (theirs, ours))
    )


def _rounds_to(wide: LazyTensor, narrow: LazyTensor) -> bool:
    if narrow.dtype == "F64":
        return False
    try:
        return _equal(wide.cast(narrow.dtype), narrow)
    except ConversionError:  # a value beyond fp16's range: not the same
        return False


def _equal(first: LazyTensor, second: LazyTensor) -> bool:
    pairs = zip(_pieces(first), _pieces(second), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _pieces(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """The elements in order, in pieces of one size whatever blocks the tensor is read in."""
    held: list[np.ndarray] = []
    count = 0
    for block in tensor.blocks():
        flat = np.ravel(block)
        while count + flat.size >= BLOCK_ELEMENTS:
            cut = BLOCK_ELEMENTS - count
            yield np.concatenate([*held, flat[:cut]])
            held, count, flat = [], 0, flat[cut:]
        held.append(flat)
        count += flat.size
    yield np.concatenate(held) if held else np.empty(0)
