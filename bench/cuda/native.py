"""The CUDA kernels of nanoflow on torch's GPU tensors, by way of bench/cuda/kernel_api.cc."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # core/dtype.h
GEMM_WORKSPACE = 64 << 20
NO_WINDOW = 1 << 30  # kernels/cuda/attention.h


class GemmArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "out")),
        *((name, ctypes.c_int) for name in ("rows", "features", "depth")),
        *((name, ctypes.c_int64) for name in ("x_stride", "weight_stride", "out_stride")),
        *((name, ctypes.c_bool) for name in ("accumulate", "is_gelu")),
        ("sms", ctypes.c_int),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    ]


PLAN_TABLES = ("segment_requests", "row_begin", "row_count", "kv_len", "page_indptr")


class PlanArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in PLAN_TABLES),
        *(
            (name, ctypes.c_int)
            for name in ("segment_begin", "segment_end", "requests", "group", "kv_heads")
        ),
        *((name, ctypes.c_int) for name in ("window", "ctas")),
        ("tiles_all", ctypes.c_bool),
        ("work", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
    ]


class AttentionArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "out", "k_cache", "v_cache", "page_indices")),
        *(
            (name, ctypes.c_int64)
            for name in ("q_stride", "out_stride", "page_stride", "head_stride", "key_stride")
        ),
        *((name, ctypes.c_int) for name in ("group", "kv_heads", "page_shift", "pages", "window")),
        ("scale_log2", ctypes.c_float),
        ("work", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("ctas", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]


class NativeError(RuntimeError):
    """A kernel refused its arguments."""


@dataclasses.dataclass(frozen=True)
class AttentionBatch:
    """Requests with `rows[i]` new rows each of `kv_len[i]` keys; tables as in kernels/ops.h."""

    tables: dict[str, torch.Tensor]
    rows: list[int]
    kv_len: list[int]
    row_begin: list[int]
    pages: list[list[int]]
    padded_rows: int


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


class Kernels:
    """Every call enqueues on torch's current stream; scratch memory is shared by all calls."""

    def __init__(self, library: Path) -> None:
        self._native = ctypes.CDLL(str(library))
        for name in ("nf_gemm", "nf_plan_attention", "nf_attention", "nf_gemm_name"):
            getattr(self._native, name).restype = ctypes.c_char_p
        self._native.nf_attention_work_bytes.restype = ctypes.c_size_t
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self._workspace = torch.empty(GEMM_WORKSPACE, dtype=torch.uint8, device="cuda")
        self._workspace.fill_(0xFF)

    def _check(self, message: bytes | None) -> None:
        if message is not None:
            raise NativeError(message.decode())

    def gemm_names(self) -> list[str]:
        count = self._native.nf_gemm_kernels()
        return [self._native.nf_gemm_name(i).decode() for i in range(count)]

    def choose_gemm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        sms: int,
        silu_mul: bool = False,
    ) -> int:
        rows, depth = x.shape
        types = DTYPES[x.dtype], DTYPES[out.dtype], silu_mul
        return int(self._native.nf_choose_gemm(rows, weight.shape[0], depth, sms, *types))

    def gemm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        kernel: int | None = None,
        sms: int | None = None,
        bias: torch.Tensor | None = None,
        accumulate: bool = False,
        silu_mul: bool = False,
    ) -> None:
        """out = x @ weight.T by the given kernel, or the one that nanoflow chooses.

        With `silu_mul`, out = silu(x @ gate.T) * (x @ up.T), eight rows of each in turn in weight.
        """
        sms = sms or self.sms
        if kernel is None:
            kernel = self.choose_gemm(x, weight, out, sms, silu_mul)
        arguments = GemmArguments(
            x.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            weight.shape[0],
            x.shape[1],
            x.stride(0),
            weight.stride(0),
            out.stride(0),
            accumulate,
            False,
            sms,
            self._workspace.data_ptr(),
            GEMM_WORKSPACE,
            stream(),
        )
        types = DTYPES[x.dtype], DTYPES[out.dtype], silu_mul
        self._check(self._native.nf_gemm(kernel, *types, ctypes.byref(arguments)))

    def attention_work(self, batch: AttentionBatch, heads: int, kv_heads: int) -> torch.Tensor:
        requests = batch.tables["row_begin"].numel()
        size = self._native.nf_attention_work_bytes(
            requests, batch.padded_rows, heads // kv_heads, kv_heads, self.sms
        )
        return torch.full((size,), 0x7F, dtype=torch.uint8, device="cuda")

    def plan_attention(
        self,
        batch: AttentionBatch,
        work: torch.Tensor,
        heads: int,
        kv_heads: int,
        segments: tuple[int, int],
        sms: int | None = None,
        tiles_all: bool = False,
    ) -> None:
        arguments = PlanArguments(
            *(batch.tables[name].data_ptr() for name in PLAN_TABLES),
            *segments,
            batch.tables["row_begin"].numel(),
            heads // kv_heads,
            kv_heads,
            NO_WINDOW,
            sms or self.sms,
            tiles_all,
            work.data_ptr(),
            stream(),
        )
        self._check(self._native.nf_plan_attention(ctypes.byref(arguments)))

    def attention(
        self,
        q: torch.Tensor,  # [T, Hq * D]
        out: torch.Tensor,  # [T, Hq * D]
        k_cache: torch.Tensor,  # [P, Hkv, page_size, D]
        v_cache: torch.Tensor,
        batch: AttentionBatch,
        work: torch.Tensor,
        sms: int | None = None,
    ) -> None:
        """Attention of the requests that `work` was planned for, with scale D^-1/2."""
        kv_heads, page_size, head_dim = k_cache.shape[1:]
        arguments = AttentionArguments(
            q.data_ptr(),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            batch.tables["page_indices"].data_ptr(),
            q.stride(0),
            out.stride(0),
            *k_cache.stride()[:3],
            q.shape[1] // (head_dim * kv_heads),
            kv_heads,
            page_size.bit_length() - 1,
            k_cache.shape[0],
            NO_WINDOW,
            head_dim**-0.5 * math.log2(math.e),
            work.data_ptr(),
            self._workspace.data_ptr(),
            sms or self.sms,
            stream(),
        )
        self._check(self._native.nf_attention(head_dim, DTYPES[q.dtype], ctypes.byref(arguments)))


def attention_batch(
    segments: list[list[tuple[int, int]]], page_size: int, granularity: int, seed: int
) -> AttentionBatch:
    """A batch of segments of (rows, kv_len) requests; pages are dealt at random."""
    rows, kv_len, row_begin, segment_requests, at = [], [], [], [0], 0
    for segment in segments:
        for count, length in segment:
            rows.append(count)
            kv_len.append(length)
            row_begin.append(at)
            at += count
        at = -(-at // granularity) * granularity
        segment_requests.append(len(rows))
    counts = [-(-length // page_size) for length in kv_len]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    pages, indptr = [], [0]
    for count in counts:
        pages.append(order[indptr[-1] : indptr[-1] + count])
        indptr.append(indptr[-1] + count)
    lists = {
        "segment_requests": segment_requests,
        "row_begin": row_begin,
        "row_count": rows,
        "kv_len": kv_len,
        "page_indptr": indptr,
        "page_indices": order,
    }
    tables = {k: torch.tensor(v, dtype=torch.int32, device="cuda") for k, v in lists.items()}
    return AttentionBatch(tables, rows, kv_len, row_begin, pages, at)
