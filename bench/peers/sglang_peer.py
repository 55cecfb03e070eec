"""SGLang. Options: those of sglang.Engine."""

from __future__ import annotations

from typing import Any

from driver import Generate, Request, drive


def load(work: dict[str, Any]) -> Generate:
    from sglang import Engine

    arguments = {
        "dtype": work["dtype"],
        "device": work["device"],
        "context_length": work["max_model_len"],
        "disable_radix_cache": True,
        "skip_tokenizer_init": True,  # token ids in and out
    }
    engine = Engine(model_path=work["model"], **(arguments | work["options"]))

    def generate(requests: list[Request]) -> list[list[int]]:
        params = [
            {"temperature": 0, "max_new_tokens": one["output_len"], "ignore_eos": True}
            for one in requests
        ]
        prompts = [one["prompt_token_ids"] for one in requests]
        outputs = engine.generate(input_ids=prompts, sampling_params=params)
        return [list(output["output_ids"]) for output in outputs]

    return generate


if __name__ == "__main__":
    drive(load, ["sglang", "torch"])
