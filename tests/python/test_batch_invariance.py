"""On a CPU, a request's tokens and log-probabilities do not depend on what runs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanoflow import LLM, SamplingParams
from nanoflow.config import make_args
from nanoflow.devices import make_backends
from nanoflow.outputs import RequestOutput
from tiny_models import write_tiny_llama

SIZES: dict[str, Any] = {"max_model_len": 96, "block_size": 8, "cpu_threads": 2}
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


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), tokenizer=True, dtype=request.param)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_seqs": 16},
        {"max_num_seqs": 5, "max_num_batched_tokens": 24},  # prompts in chunks, by what is beside
        {"max_num_seqs": 8, "num_gpu_blocks_override": 20},  # requests are preempted
        {"max_num_seqs": 16, "schedule": "nano"},
    ],
)
def test_what_runs_beside_changes_no_bit(model: Path, arguments: dict[str, Any]) -> None:
    with LLM(model, batch_invariant=True, max_num_seqs=1, **SIZES) as llm:
        alone = [
            exactly(llm.generate([prompt], params, use_tqdm=False)[0])
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    with LLM(model, batch_invariant=True, **{**SIZES, **arguments}) as llm:
        together = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert [exactly(output) for output in together] == alone


def test_only_a_cpu_keeps_it() -> None:
    with pytest.raises(ValueError, match="batch_invariant=True with device='cuda:1': on a GPU"):
        make_args({"model": "tiny", "batch_invariant": True, "device": "cuda:1"})
    args = make_args({"model": "tiny", "batch_invariant": True})
    assert make_backends(args)[0].device == "cpu"
