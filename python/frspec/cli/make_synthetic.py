"""`frspec make-synthetic`: models of true shapes with random weights, to measure what they cost."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from ..convert.layout import check_config, read_config
from ..convert.output import check_destination, staged_folder, write_json
from ..errors import ConversionError, MemoryPlanError, ModelError, RequestError
from ..files import user_path
from ..ranking import Ranking

# The sizes of the published config.json files.
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "qwen2-7b": _LLAMA
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
}

_LARGEST_SEED = 2**31 - 1
_MEDUSA_HEADS = 5  # as trained in the paper (arXiv 2401.10774, section 3)

_EPILOG = """\
examples:
  frspec make-synthetic --config llama-3-8b ./synthetic
  frspec info --model ./synthetic --drafter ./synthetic/drafter --max-context 4096
  frspec-bench --model ./synthetic --drafter ./synthetic/drafter \\
      --ranking ./synthetic/ranking.safetensors --vocab-sizes full 32768 \\
      --plant-accept-length 3.9 3.6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `frspec make-synthetic`."""
    parser.description = (
        "Writes a folder of a model of true shape, with an EAGLE drafter in OUT/drafter, Medusa"
        " heads in OUT/medusa and a ranking, whose weights are random and are made on the device"
        " when it is loaded. What it writes means nothing; how long each step takes is what a model"
        " of that shape takes."
    )
    parser.epilog = _EPILOG
    parser.add_argument(
        "--config",
        required=True,
        metavar="SHAPE|FILE",
        help=f"{', '.join(SHAPES)}, or a config.json",
    )
    parser.add_argument(
        "--seed", type=int, default=1, metavar="S", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is not empty")
    parser.add_argument("out", metavar="OUT", help="folder to write")


def run(args: argparse.Namespace) -> int:
    """Runs the command; raises a FrspecError when it cannot."""
    if not 0 <= args.seed <= _LARGEST_SEED:
        raise RequestError(f"--seed: expected 0 to {_LARGEST_SEED}, found {args.seed}")
    config = _read_config(args.config) | {"frspec_synthetic_seed": args.seed}
    out = user_path(args.out)
    sources = [] if args.config in SHAPES else [user_path(args.config)]
    check_destination(out, sources, force=args.force)
    with staged_folder(out, 1 << 20) as stage:
        write_json(stage / "config.json", config)
        (stage / "drafter").mkdir()
        write_json(stage / "drafter" / "config.json", config | {"num_hidden_layers": 1})
        (stage / "medusa").mkdir()
        write_json(
            stage / "medusa" / "config.json",
            {
                "medusa_num_heads": _MEDUSA_HEADS,
                "medusa_num_layers": 1,
                "hidden_size": config["hidden_size"],
                "vocab_size": config["vocab_size"],
                "frspec_synthetic_seed": args.seed,
            },
        )
        # Which tokens are frequent means nothing here either: the lowest ids.
        counts = np.arange(config["vocab_size"], 0, -1, dtype=np.int64)
        Ranking.from_counts(
            counts, tokenizer_fingerprint="synthetic", corpus="none (synthetic)", special_ids=[]
        ).save(stage / "ranking.safetensors")
    print(f"{out}: random weights of the shape of {args.config}, made when it is loaded")
    return 0


def _read_config(name: str) -> dict[str, Any]:
    if name in SHAPES:
        return SHAPES[name]
    path = user_path(name)
    if not path.is_file():
        raise ModelError(
            f"--config: expected {', '.join(SHAPES)} or a config.json, found {name!r}, no such file"
        )
    config = read_config(path)
    try:
        check_config(config, path)
    except MemoryPlanError:
        pass  # a shape may be larger than this machine
    except ConversionError as error:
        raise ModelError(str(error)) from None
    return config
