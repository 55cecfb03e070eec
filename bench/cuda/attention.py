"""Times paged attention in bursts and sustained: GB/s of KV for decodes, TFLOP/s for prefill.

Usage: python bench/cuda/attention.py LIBRARY OUT.json COMMIT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from native import Kernels, attention_batch
from timing import burst_us, environment, sustained

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ENGINE_PAGE = 64  # tokens of a page where nobody says otherwise
CASES = {
    "1024 decodes of 768": [(1, 768)] * 1024,
    "512 decodes of 768": [(1, 768)] * 512,
    "300 decodes of 768": [(1, 768)] * 300,
    "512 decodes of 1 to 1535": [(1, 1 + 3 * i) for i in range(512)],
    "64 decodes of 8192": [(1, 8192)] * 64,
    "8 decodes of 1024": [(1, 1024)] * 8,
    "prefill 512": [(512, 512)],
    "prefill 4 of 512": [(512, 512)] * 4,
    "prefill 2048": [(2048, 2048)],
    "prefill 1024 of 8192": [(1024, 8192)],
    "590 decodes of 768 and prefill 590": [(1, 768)] * 590 + [(512, 512), (78, 590)],
}


WIDTHS = (132, 64, 48, 40, 32, 24, 16)
SUSTAINED = "1024 decodes of 768"  # timed at all widths


def measure(kernels: Kernels, name: str, page_size: int) -> list[dict[str, Any]]:
    batch = attention_batch([CASES[name]], page_size, 16, seed=0)
    pages = batch.tables["page_indices"].numel()
    cache = torch.randn(
        pages, 2, KV_HEADS, page_size, HEAD_DIM, device="cuda", dtype=torch.bfloat16
    )
    q = torch.randn(batch.padded_rows, HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    work = kernels.attention_work(batch, HEADS, KV_HEADS)
    plan_us = burst_us(lambda _: kernels.plan_attention(batch, work, HEADS, KV_HEADS, (0, 1)))
    kv_bytes = 4 * KV_HEADS * HEAD_DIM * sum(batch.kv_len)
    flop = sum(
        4 * HEADS * HEAD_DIM * n * (length - (n - 1) / 2)
        for n, length in zip(batch.rows, batch.kv_len, strict=True)
    )
    entries = []
    for sms in WIDTHS if name == SUSTAINED else WIDTHS[:1]:
        kernels.plan_attention(batch, work, HEADS, KV_HEADS, (0, 1), sms)

        def run(_: int, sms: int = sms) -> None:
            kernels.attention(q, out, cache[:, 0], cache[:, 1], batch, work, sms)

        us = burst_us(run)
        entry: dict[str, Any] = {"case": name, "page_size": page_size, "sms": sms, "us": us}
        entry["kv_gb_s"] = kv_bytes / us * 1e-3
        entry["tflop_s"] = flop / us * 1e-6
        entry["plan_us"] = plan_us
        if name == SUSTAINED and page_size == ENGINE_PAGE:
            entry["sustained"] = sustained(run)
            gb_s = kv_bytes / entry["sustained"]["us"] * 1e-3
            entry["sustained"] |= {
                "kv_gb_s": gb_s,
                "kv_gb_s_per_sm": gb_s / sms,
                "pj_per_byte": entry["sustained"]["watts"] / gb_s * 1e3,
            }
        entries.append(entry)
        print(
            f"{name:36} page {page_size:3} {sms:4} SMs {us:8.1f} us {entry['kv_gb_s']:7.0f} GB/s "
            f"{entry['tflop_s']:6.1f} TFLOP/s plan {plan_us:.1f} us",
            *(f"{k} {v:.0f}" for k, v in entry.get("sustained", {}).items()),
        )
    return entries


def main() -> None:
    kernels = Kernels(Path(sys.argv[1]))
    torch.manual_seed(0)
    results = []
    for page_size in (16, 64):
        for name in CASES:
            results += measure(kernels, name, page_size)
    Path(sys.argv[2]).write_text(
        json.dumps({**environment(sys.argv[3]), "results": results}, indent=1)
    )


if __name__ == "__main__":
    main()
