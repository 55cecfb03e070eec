"""Batches of transformers' `generate`. Options: `batch_size` (all requests), and those of
AutoModelForCausalLM.from_pretrained.

Prompts of a batch are padded on the left, and every request of it generates as many tokens as the
longest one: what a request did not ask for is cut off.
"""

from __future__ import annotations

from typing import Any

import torch
from driver import Generate, Request, drive
from transformers import AutoModelForCausalLM


def load(work: dict[str, Any]) -> Generate:
    options = dict(work["options"])
    batch_size = options.pop("batch_size", None)
    if work["device"] == "cpu":
        torch.set_num_threads(work["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        work["model"], dtype=getattr(torch, work["dtype"]), **options
    )
    model = model.to(work["device"]).eval()

    def generate(requests: list[Request]) -> list[list[int]]:
        step = batch_size or len(requests)
        batches = (requests[i : i + step] for i in range(0, len(requests), step))
        return [ids for batch in batches for ids in run_batch(model, batch)]

    return generate


def run_batch(model: Any, batch: list[Request]) -> list[list[int]]:
    width = max(len(one["prompt_token_ids"]) for one in batch)
    padding = [width - len(one["prompt_token_ids"]) for one in batch]
    ids = [[0] * pad + one["prompt_token_ids"] for pad, one in zip(padding, batch, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in padding]
    longest = max(one["output_len"] for one in batch)
    with torch.inference_mode():
        tokens = model.generate(
            torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=False,
            min_new_tokens=longest,
            max_new_tokens=longest,
            pad_token_id=0,
        )
    new = tokens[:, width:].tolist()
    return [out[: one["output_len"]] for out, one in zip(new, batch, strict=True)]


if __name__ == "__main__":
    drive(load, ["transformers", "torch"])
