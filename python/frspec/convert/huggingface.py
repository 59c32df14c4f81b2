"""A Hugging Face model with PyTorch weights (or of another dtype) as a model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from frspec.convert.layout import (
    ARCHITECTURES,
    check_config,
    copy_companions,
    model_shapes,
    read_config,
    select,
    with_classic_rope,
    with_torch_dtype,
)
from frspec.convert.output import Progress, staged_folder, write_json, write_weights
from frspec.convert.sentencepiece import tokenizer_from_sentencepiece
from frspec.convert.tensors import WEIGHT_DTYPES, LazyTensor
from frspec.convert.weights import Checkpoint
from frspec.errors import ConversionError

# Computed from the config; older checkpoints stored it in every layer.
ROTARY_BUFFER = re.compile(r".*\brotary_emb\.(inv_freq|cos_cached|sin_cached)")


def own_dtype(tensors: list[LazyTensor]) -> str:
    """The option word of the first tensor's dtype; float64 becomes fp32."""
    words = {code: word for word, (code, _) in WEIGHT_DTYPES.items()}
    return words.get(tensors[0].dtype, "fp32")


def convert_huggingface(
    checkpoint: Checkpoint, out: Path, dtype: str | None, progress: Progress | None = None
) -> list[str]:
    """Writes `checkpoint` as the model folder `out`; returns notes for the user."""
    where = checkpoint.folder / "config.json"
    config = with_classic_rope(read_config(where))
    architecture = _architecture(config, where)
    config = {**config, "architectures": [architecture]}
    # Before anything is made of its sizes. The weights' type is settled below.
    check_config(with_torch_dtype(config, "float32"), where)
    shapes = model_shapes(config, where)
    found = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if not ROTARY_BUFFER.fullmatch(name)
    }
    tied = config.get("tie_word_embeddings", False) is True
    if tied:
        found.pop("lm_head.weight", None)
    tensors = select(found, shapes, {"lm_head.weight"} if tied else set(), checkpoint.folder)
    code, torch_name = WEIGHT_DTYPES[dtype or own_dtype(tensors)]
    tensors = [tensor.cast(code) for tensor in tensors]

    config = with_torch_dtype(config, torch_name)
    notes: list[str] = []
    with staged_folder(out, sum(tensor.nbytes for tensor in tensors)) as stage:
        write_json(stage / "config.json", config)
        copy_companions(checkpoint.folder, stage)
        if not (stage / "tokenizer.json").exists():
            notes += _make_tokenizer(checkpoint.folder, stage, config["vocab_size"])
        write_weights(stage, tensors, progress)
    return notes


def _architecture(config: dict[str, Any], where: Path) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names and names[0] in ARCHITECTURES:
        return names[0]
    by_type = {model_type: name for name, model_type in ARCHITECTURES.items()}
    if not names and config.get("model_type") in by_type:
        return by_type[config["model_type"]]
    raise ConversionError(
        f"{where}: architectures: expected one of {', '.join(ARCHITECTURES)}, found {names!r}"
    )


def _make_tokenizer(source: Path, stage: Path, vocab_size: int) -> list[str]:
    """Makes tokenizer.json of a SentencePiece tokenizer.model, which older checkpoints have."""
    model = source / "tokenizer.model"
    if not model.is_file():
        return [f"{source}: no tokenizer.json: the converted model takes token ids only"]
    tokenizer_from_sentencepiece(model, vocab_size).save(str(stage / "tokenizer.json"))
    return [f"tokenizer.json made of {model.name}"]
