"""nanoflow itself, on equal terms. Options: those of nanoflow.LLM."""

from __future__ import annotations

from typing import Any

from driver import Generate, Request, drive

from nanoflow import LLM, SamplingParams


def load(work: dict[str, Any]) -> Generate:
    arguments = {
        "dtype": work["dtype"],
        "device": work["device"],
        "cpu_threads": work["threads"] if work["device"] == "cpu" else 0,
        "max_model_len": work["max_model_len"],
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
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
        return [output.outputs[0].token_ids for output in outputs]

    return generate


if __name__ == "__main__":
    drive(load, ["nanoflow", "numpy"])
