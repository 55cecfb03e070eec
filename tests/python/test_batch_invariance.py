"""With batch_invariant a request's tokens and log-probabilities depend on nothing beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SMALL_CACHE, has_cuda
from nanoflow import LLM, SamplingParams
from nanoflow.config import make_args
from nanoflow.devices import make_backends
from nanoflow.outputs import RequestOutput
from tiny_models import write_tiny_llama

SIZES: dict[str, Any] = {
    "max_model_len": 96,
    "block_size": 8,
    "cpu_threads": 2,
    "kv_cache_memory_bytes": SMALL_CACHE,
}
PROMPTS = [np.random.default_rng(n).integers(3, 150, 1 + 9 * n % 50).tolist() for n in range(16)]
PARAMS = [
    SamplingParams(temperature=0.9, seed=n, max_tokens=5 + n, ignore_eos=True, logprobs=2)
    for n in range(16)
]


def exactly(output: RequestOutput) -> Any:
    """All that was generated, to the last bit."""
    [completion] = output.outputs
    logprobs = completion.logprobs or []
    return completion.token_ids, [
        {token: entry.logprob.hex() for token, entry in entries.items()} for entries in logprobs
    ]


# Hidden sizes of four heads; a GPU takes those of 64 or more, and no float32.
ON_GPU = [("cuda", "bfloat16", 256), ("cuda", "float16", 256), ("cuda", "bfloat16", 1024)]
MODELS = [("cpu", "float32", 64), ("cpu", "bfloat16", 64), *(ON_GPU if has_cuda() else [])]


@pytest.fixture(scope="module", params=MODELS, ids=lambda found: "-".join(map(str, found)))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """A device, and a model for it."""
    device, dtype, hidden_size = request.param
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder, tokenizer=True, dtype=dtype, hidden_size=hidden_size)
    return device, folder


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_seqs": 16},
        {"max_num_seqs": 5, "max_num_batched_tokens": 24},  # prompts in chunks, by what is beside
        {"max_num_seqs": 8, "num_gpu_blocks_override": 20},  # requests are preempted
        {"max_num_seqs": 16, "schedule": "nano"},
    ],
)
def test_what_runs_beside_changes_no_bit(
    model: tuple[str, Path], arguments: dict[str, Any]
) -> None:
    device, folder = model
    sizes = {**SIZES, "device": device}
    if device == "cuda":
        del sizes["cpu_threads"]
    with LLM(folder, batch_invariant=True, max_num_seqs=1, **sizes) as llm:
        alone = [
            exactly(llm.generate([prompt], params, use_tqdm=False)[0])
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    with LLM(folder, batch_invariant=True, **{**sizes, **arguments}) as llm:
        together = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [exactly(output) for output in together] == alone


def test_several_gpus_do_not_keep_it() -> None:
    with pytest.raises(ValueError, match="device='cuda:1' and tensor_parallel_size=2: several"):
        make_args(
            {
                "model": "tiny",
                "batch_invariant": True,
                "device": "cuda:1",
                "tensor_parallel_size": 2,
            }
        )
    on_any = {"model": "tiny", "batch_invariant": True, "tensor_parallel_size": 2}
    assert make_backends(make_args(on_any))[0].device == "cpu"
