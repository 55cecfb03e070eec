"""The command `nanoflow export-spec`: a model as programs in C++ read it."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanoflow import _core
from nanoflow.arguments import add_engine_arguments, engine_arguments
from nanoflow.config import EngineArgs
from nanoflow.loading import open_checkpoint
from nanoflow.runtime import make_spec

ENGINE_FLAGS = ("dtype", "load_format", "revision", "seed")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_export)
    add = parser.add_argument
    add("model", help="folder with safetensors, .gguf file, or Hugging Face repository")
    add("out_dir", type=Path, help="folder that gets model.txt and weights.bin")
    add_engine_arguments(parser, ENGINE_FLAGS)


def run_export(options: argparse.Namespace) -> None:
    """Raises as LLM() where the model cannot be read, EngineError where it cannot be written."""
    args = EngineArgs(**engine_arguments(options))
    spec = export_spec(args, options.out_dir)
    size = sum(path.stat().st_size for path in options.out_dir.iterdir())
    print(f"{options.out_dir}: {spec.num_layers} layers, {spec.dtype}, {size:,} bytes")


def export_spec(args: EngineArgs, out_dir: Path) -> _core.ModelSpec:
    """Writes the model's dimensions and weights, which are held in memory meanwhile.

    The format is told in csrc/model/model_folder.h.
    """
    checkpoint = open_checkpoint(
        args.model, args.load_format, revision=args.revision, seed=args.seed
    )
    spec = make_spec(args, checkpoint)
    weights = _core.Weights(spec, _core.Backend("cpu"))
    checkpoint.load_weights(weights)
    _core.write_model(weights, out_dir)
    return spec
