"""Write the model of a GGUF file as a Hugging Face folder, which all peers read.

python bench/as_safetensors.py MODEL.gguf FOLDER      # SmolLM2-135M-Instruct without MODEL.gguf

transformers dequantises it to bfloat16, so that every engine has the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanoflow.bench.default_model import default_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args(arguments)
    path = options.model or default_model()
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    model.hf_quantizer = None  # its weights are plain by now
    del model.config.quantization_config
    model.save_pretrained(options.folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(options.folder)
    print(options.folder)


if __name__ == "__main__":
    main()
