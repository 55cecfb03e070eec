"""Contract of the C++ module (regenerated from the built module later)."""
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class EngineError(RuntimeError): ...

class ModelSpec:
    def __init__(self, *, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int,
                 num_heads: int, num_kv_heads: int, head_dim: int, rope_inv_freq: Sequence[float],
                 rms_norm_eps: float = 1e-5, tie_word_embeddings: bool = False,
                 dtype: str = "bfloat16") -> None: ...
    # every argument is also a read-only attribute; dtype a str
    @property
    def kv_bytes_per_token(self) -> int: ...

class Backend:
    def __init__(self, device: str = "cpu", threads: int = 0, isa: str = "auto") -> None: ...
    device: str
    description: str
    width: int
    free_memory: int

def cpu_isas() -> list[str]: ...

class Weights:
    def __init__(self, spec: ModelSpec, backend: Backend) -> None: ...
    def load(self, name: str, array: NDArray[Any], row_begin: int = 0) -> None:
        """array: float32, float16, or uint16 holding bfloat16 bits; C-contiguous; shape (rows, ...) or (H,)."""
    def check_complete(self) -> None: ...
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    bytes: int

class LaneSpec:
    def __init__(self, name: str, width: int) -> None: ...
    name: str
    width: int

class StageSpec:
    def __init__(self, split: Sequence[float] = (), lane: str = "") -> None: ...
    split: list[float]
    lane: str

class Schedule:
    def __init__(self, id: str, lanes: Sequence[LaneSpec], stages: dict[str, StageSpec] = ...,
                 order: Sequence[str] = ()) -> None: ...
    id: str
    lanes: list[LaneSpec]
    stages: dict[str, StageSpec]
    order: list[str]
    def cuts(self) -> list[float]: ...
    def check(self) -> None: ...

class EngineConfig:
    def __init__(self, *, max_num_batched_tokens: int = 2048, max_num_seqs: int = 256,
                 max_model_len: int = 2048, page_size: int = 64, num_pages: int = 0,
                 row_granularity: int = 0, jitter_us: int = 0) -> None: ...

class Batch:
    """Arrays as in csrc/pipeline/batch.h; int32 unless said otherwise; copied."""
    def __init__(self, *, tokens: NDArray[np.int32], positions: NDArray[np.int32],
                 request_indptr: NDArray[np.int32], kv_len: NDArray[np.int32],
                 page_indptr: NDArray[np.int32], page_indices: NDArray[np.int32],
                 segment_requests: NDArray[np.int32], sample_rows: NDArray[np.int32],
                 slots: NDArray[np.int32], temperature: NDArray[np.float32],
                 top_p: NDArray[np.float32], min_p: NDArray[np.float32], top_k: NDArray[np.int32],
                 seed: NDArray[np.uint64], counter: NDArray[np.int32],
                 banned_indptr: NDArray[np.int32], banned: NDArray[np.int32],
                 want_logits: bool = False, want_timings: bool = False) -> None: ...

class OpTiming:
    name: str
    lane: str
    begin_us: float
    end_us: float

class StepResult:
    tokens: NDArray[np.int32]
    logits: NDArray[np.float32] | None
    timings: list[OpTiming]

class StepHandle:
    step: int
    def is_done(self) -> bool: ...
    def wait(self) -> StepResult: ...

class Plan:
    def __repr__(self) -> str: ...
    def validate(self) -> list[str]: ...

class Engine:
    def __init__(self, config: EngineConfig, weights: Weights, schedule: Schedule) -> None: ...
    def submit(self, batch: Batch) -> StepHandle: ...
    completed_steps: int
    schedule: Schedule
    config: EngineConfig
    def set_schedule(self, schedule: Schedule) -> None: ...
    def plan(self, segment_rows: Sequence[int], samples: int) -> Plan: ...

def run_op(name: str, backend: Backend, width: int = 0, **operands: Any) -> None:
    """Runs one op on NumPy arrays in place: uint16 arrays are bfloat16."""
