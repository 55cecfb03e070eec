"""Checks the CUDA kernels against float32 torch: odd sizes, poisoned outputs, repeated runs.

Usage: python bench/cuda/check.py LIBRARY [--kernels NUMBER ...]
With numbers, only products are checked, on these kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import torch
from native import AttentionBatch, Kernels, NativeError, attention_batch

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 5e-5}  # ‖error‖ / ‖reference‖


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


def error_of(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What becomes of the sums of a product."""

    bias: bool = False
    accumulate: bool = False
    silu_mul: bool = False

    def __call__(
        self, sums: torch.Tensor, bias: torch.Tensor | None, old: torch.Tensor
    ) -> torch.Tensor:
        """In float64: sums is [T, N], bias [N], old what out held."""
        if self.silu_mul:
            groups = sums.view(sums.shape[0], -1, 2, 8)
            sums = torch.nn.functional.silu(groups[:, :, 0]) * groups[:, :, 1]
            sums = sums.reshape(old.shape)
        if bias is not None:
            sums = sums + bias.double()
        return sums + old.double() if self.accumulate else sums


EPILOGUES = [
    Epilogue(),
    Epilogue(bias=True),
    Epilogue(accumulate=True),
    Epilogue(bias=True, accumulate=True),
    Epilogue(silu_mul=True),
]


def check_gemm(
    kernels: Kernels,
    kernel: int | None,
    shape: tuple[int, int, int],
    sms: int,
    types: tuple[torch.dtype, torch.dtype],
    epilogue: Epilogue,
) -> str | None:
    """What is wrong with a product inside wider buffers, or None."""
    rows, features, depth = shape
    x = torch.randn(rows, depth + 64, device="cuda").to(types[0])[:, :depth]
    weight = (torch.randn(features, depth, device="cuda") * 0.1).to(types[0])
    bias = torch.randn(features, device="cuda").to(types[0]) if epilogue.bias else None
    columns = features // 2 if epilogue.silu_mul else features
    old = torch.randn(rows, columns, device="cuda").to(types[1])
    runs = []
    for _ in range(3):
        buffer = poisoned((rows + 2, columns + 32), types[1])
        out = buffer[1 : rows + 1, :columns]
        if epilogue.accumulate:
            out.copy_(old)
        kernels.gemm(x, weight, out, kernel, sms, bias, epilogue.accumulate, epilogue.silu_mul)
        runs.append(buffer)
    if not all(torch.equal(runs[0].nan_to_num(7.0), r.nan_to_num(7.0)) for r in runs[1:]):
        return "differs between runs"
    error = error_of(out, epilogue(x.double() @ weight.double().T, bias, old))
    out.fill_(float("nan"))
    if not buffer.isnan().all():
        return "writes outside"
    return None if error < LIMIT[types[1]] else f"error {error:.2e}"


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: AttentionBatch, request: int
) -> torch.Tensor:
    """[n, Hq, D] of one request, in float32."""
    n, length, begin = batch.rows[request], batch.kv_len[request], batch.row_begin[request]
    kv_heads, head_dim = k.shape[1], k.shape[3]
    pages = batch.pages[request]
    queries = q[begin : begin + n].float().view(n, kv_heads, -1, head_dim)
    keys = k[pages].float().transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length]
    values = v[pages].float().transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :length]
    scores = torch.einsum("nhgd,hkd->hgnk", queries, keys) * head_dim**-0.5
    seen = torch.arange(length, device="cuda") < length - n + 1 + torch.arange(
        n, device="cuda"
    ).unsqueeze(1)
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hgnk,hkd->nhgd", weights, values).reshape(n, -1)


def check_attention(
    kernels: Kernels,
    segments: list[list[tuple[int, int]]],
    group: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    sms: int,
) -> str | None:
    batch = attention_batch(segments, page_size, 16, seed=len(segments[0]))
    heads = group * kv_heads
    qkv = torch.randn(batch.padded_rows, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
    q = qkv[:, : heads * head_dim]
    num_pages = batch.tables["page_indices"].numel()
    cache = torch.randn(num_pages, 2, kv_heads, page_size, head_dim, device="cuda").to(dtype)
    for request, length in enumerate(batch.kv_len):  # what lies behind a request's last key
        if length % page_size:
            cache[batch.pages[request][-1], :, :, length % page_size :] = float("nan")
    k, v = cache[:, 0], cache[:, 1]
    out = poisoned((batch.padded_rows, heads * head_dim), dtype)
    work = kernels.attention_work(batch, heads, kv_heads)
    results = []
    for _ in range(3):  # layers share a plan
        out.fill_(float("nan"))
        for segment in range(len(segments)):
            kernels.plan_attention(
                batch, work, heads, kv_heads, (segment, segment + 1), sms, head_dim > 128
            )
            for _ in range(2):
                kernels.attention(q, out, k, v, batch, work, sms)
        results.append(out.clone())
    if not all(torch.equal(results[0].nan_to_num(7.0), r.nan_to_num(7.0)) for r in results[1:]):
        return "differs between runs"
    written = torch.zeros(batch.padded_rows, dtype=torch.bool, device="cuda")
    worst = 0.0
    for request in range(len(batch.rows)):
        begin, n = batch.row_begin[request], batch.rows[request]
        written[begin : begin + n] = True
        reference = attention_reference(q, k, v, batch, request)
        worst = max(worst, error_of(out[begin : begin + n], reference))
    if not out[~written].isnan().all():
        return "writes padding rows"
    return None if worst < LIMIT[dtype] else f"error {worst:.2e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("--kernels", nargs="+", type=int)
    options = parser.parse_args()
    kernels = Kernels(options.library)
    torch.manual_seed(0)
    failures = checks = 0

    def report(what: str, problem: str | None) -> None:
        nonlocal failures, checks
        checks += 1
        failures += problem is not None
        if problem is not None:
            print(f"FAILED {what}: {problem}")

    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    names = kernels.gemm_names()
    shapes = [(rows, 960, 576) for rows in (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 2048)]
    shapes += [(129, 4096, 1024), (300, 1552, 4096), (1024, 6144, 4096), (64, 4096, 14336)]
    cases = itertools.product(
        ((bf16, bf16), (bf16, f32), (f16, f16), (f16, f32)),
        EPILOGUES,
        options.kernels or (None, *range(len(names))),
        shapes,
        (kernels.sms, 24),
    )
    for types, epilogue, kernel, shape, sms in cases:
        if types[1] == f32 and epilogue != Epilogue():
            continue
        name = "chosen" if kernel is None else names[kernel]
        what = f"gemm {name} {shape} {sms} SMs {types} {epilogue}"
        try:
            report(what, check_gemm(kernels, kernel, shape, sms, types, epilogue))
        except NativeError as error:
            if kernel is None or "there is no kernel" not in str(error):
                report(what, str(error))
    decodes = [(1, length) for length in (1, 15, 16, 17, 63, 64, 65, 255, 1000, 8192)]
    mixed = [*decodes[:6], (5, 5), (16, 100), (17, 17), (128, 128), (129, 700), (512, 1031)]
    batches = {
        "one key": [[(1, 1)]],
        "decodes": [decodes],
        "many decodes": [[(1, 1 + 37 * i % 1500) for i in range(250)]],
        "drafts": [[(1 + i % 4, 4 + 53 * i % 600) for i in range(100)]],
        "prefill": [[(n, n) for n in (1, 2, 31, 32, 33, 127, 128, 129)]],
        "long prefill": [[(2048, 4096)]],
        "mixed": [mixed, [(1, 300)], mixed[::-1]],
    }
    for name, segments in (batches if options.kernels is None else {}).items():
        for head_dim in (64, 128, 256):
            for group, kv_heads in ((1, 4), (2, 2), (3, 3), (4, 8), (8, 2)):
                for page_size in (16, 64):
                    for dtype in (bf16, f16):
                        for sms in (kernels.sms, 16):
                            problem = check_attention(
                                kernels, segments, group, kv_heads, head_dim, page_size, dtype, sms
                            )
                            report(
                                f"attention {name} D={head_dim} group={group} Hkv={kv_heads} "
                                f"page={page_size} {dtype} {sms} SMs",
                                problem,
                            )
    torch.cuda.synchronize()
    print(f"{checks - failures} of {checks} checks passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
