"""What a wheel that has just been installed must do, wherever it is: run with its own Python.

It holds both backends, answers on the CPU, and on a GPU or with an error that says what is missing.
Usage: python tests/installed.py [--max-mb N] [--without-cuda]
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import nanoflow
from nanoflow import LLM, EngineError, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
NO_CUDA = ("this build does not contain",)
NO_GPU = ("needs an NVIDIA driver", "does not exist", "cannot be used", "cannot run the kernels")
TOKENS = 8


def write_model(folder: Path, **config: object) -> Path:
    """A model for load_format="dummy": CONFIG with these entries instead."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return folder


def answer(model: Path, device: str) -> str:
    """The device that generated TOKENS tokens. Raises EngineError where it cannot be used."""
    with LLM(
        model, load_format="dummy", skip_tokenizer_init=True, device=device, max_model_len=128
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        [output] = llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)
        if output.error is not None or len(output.outputs[0].token_ids) != TOKENS:
            raise SystemExit(f"device={device!r}: {output}")
        return llm.device_description


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--max-mb", type=float, default=300, help="of the installed package")
    parser.add_argument("--without-cuda", action="store_true", help="it holds the CPU's alone")
    options = parser.parse_args()
    package = Path(nanoflow.__file__).parent
    names = {path.name for path in package.iterdir()}
    expected = {"libnanoflow_core.so": True, "libnanoflow_cuda.so": not options.without_cuda}
    for library, is_there in expected.items():
        if (library in names) != is_there:
            raise SystemExit(f"{package} {'lacks' if is_there else 'holds'} {library}")
    megabytes = sum(path.stat().st_size for path in package.rglob("*.*")) / 1e6
    print(f"{package}: {megabytes:.1f} MB; a compiler on the path: {shutil.which('c++')}")
    if megabytes > options.max_mb:
        raise SystemExit(f"the package has {megabytes:.1f} MB, more than {options.max_mb}")
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        for device in ("auto", "cpu"):
            print(f"device={device!r}: answers on {answer(model, device)}")
        try:
            print(f"device='cuda': answers on {answer(model, 'cuda')}")
        except EngineError as error:
            print(f"device='cuda': {error}")
            reasons = NO_CUDA if options.without_cuda else NO_GPU
            if not any(reason in str(error) for reason in reasons):
                raise SystemExit("the error does not say why there is no GPU") from error


if __name__ == "__main__":
    sys.exit(main())
