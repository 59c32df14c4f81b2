"""A GGUF file of a converted model's own bf16 weights, so that llama.cpp runs the same ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize


def write_bf16(source: Path, out: Path) -> None:
    """Copies a GGUF file with its quantised matrices as bf16, as `frspec convert` stores them."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=element)
    kept = (GGMLQuantizationType.F32, GGMLQuantizationType.BF16)
    for tensor in reader.tensors:
        values = tensor.data
        kind = tensor.tensor_type
        if kind not in kept:
            floats = dequantize(np.asarray(tensor.data), kind).astype(np.float32)
            kind = GGMLQuantizationType.BF16
            values = quantize(floats, kind)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
