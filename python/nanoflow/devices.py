"""The devices that an LLM runs on."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from nanoflow import _core
from nanoflow.config import NOT_INVARIANT, EngineArgs, cpu_threads

logger = logging.getLogger(__name__)


def make_backends(args: EngineArgs, spec: _core.ModelSpec | None = None) -> list[_core.Backend]:
    """The devices an LLM with these arguments runs on, one a rank, for a model of this spec.

    Raises ValueError on an ISA that the CPU lacks and on a model that the GPU cannot run,
    EngineError on a GPU that cannot be used and where there are fewer than ranks.
    """
    ranks, simulated = args.tensor_parallel_size, args.simulated_tensor_parallel_size
    if args.device != "cpu":
        problem = _core.cuda_problem() if args.device == "auto" else ""
        if args.batch_invariant and ranks > 1:
            problem = NOT_INVARIANT
        if not problem:
            device = "cuda" if args.device == "auto" else args.device
            backends = _core.make_backends(
                device,
                ranks,
                nccl_library=find_nccl(),
                simulated_ranks=simulated,
                batch_invariant=args.batch_invariant,
            )
            if spec is not None:
                problem = backends[0].model_problem(spec.dtype, spec.head_dim)
            if not problem:
                return backends
            if args.device != "auto":
                raise ValueError(f"device={args.device!r} cannot run {args.model}: {problem}")
        logger.info("device='auto' takes the CPU: %s", problem)
    if args.cpu_isa not in ("auto", *_core.cpu_isas()):
        raise ValueError(
            f"cpu_isa={args.cpu_isa!r} does not run here; this CPU has "
            + ", ".join(_core.cpu_isas())
        )
    return _core.make_backends(
        "cpu", ranks, threads=cpu_threads(args), isa=args.cpu_isa, simulated_ranks=simulated
    )


def find_nccl() -> str:
    """Path of the NCCL library that pip has installed; empty where it has none, and the system is
    to find one."""
    try:
        spec = importlib.util.find_spec("nvidia.nccl")
    except ModuleNotFoundError:  # no "nvidia" at all
        return ""
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "lib" / "libnccl.so.2"
        if path.exists():
            return str(path)
    return ""
