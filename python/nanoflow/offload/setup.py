"""From arguments to the tiers of an engine."""

from __future__ import annotations

import logging

from nanoflow import _core
from nanoflow.config import EngineArgs, parse_ssd
from nanoflow.loading import Checkpoint
from nanoflow.loading.fingerprint import fingerprint
from nanoflow.memory import MemoryUse
from nanoflow.offload.cost import CostModel
from nanoflow.offload.host import HostTier
from nanoflow.offload.offload import Offload
from nanoflow.offload.ssd import SsdTier

logger = logging.getLogger(__name__)

_SLOT_ALIGNMENT = 4096  # of the host pool, as in csrc/pipeline/host_pool.h


def num_host_slots(args: EngineArgs, spec: _core.ModelSpec) -> int:
    """Pages that kv_offloading_size holds. Raises ValueError where it holds none."""
    if args.kv_offloading_size is None:
        return 0
    page_bytes = spec.kv_bytes_per_token * args.block_size
    slot_bytes = -(-page_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
    slots = int(args.kv_offloading_size * (1 << 30)) // slot_bytes
    if slots == 0:
        raise ValueError(
            f"kv_offloading_size={args.kv_offloading_size} GiB hold no page of {args.block_size} "
            f"tokens, which takes {slot_bytes} bytes"
        )
    return slots


def make_offload(
    args: EngineArgs, engine: _core.Engine, checkpoint: Checkpoint, memory: MemoryUse
) -> Offload | None:
    """The tiers of an engine with a host pool; None without. Raises ValueError on an SSD folder
    that cannot be used."""
    slots = engine.config.host_slots
    if slots == 0:
        return None
    page_bytes = memory.kv_cache // memory.num_pages
    logger.info("KV offload: %d pages, %.2f GiB of host memory", slots, slots * page_bytes / 2**30)
    ssd = None
    if args.kv_offloading_ssd is not None:
        folder, size = parse_ssd(args.kv_offloading_ssd)
        dtype = checkpoint.resolve_dtype(args.dtype)
        kind = f"{fingerprint(checkpoint)} {dtype} {memory.page_size} {memory.kind}"
        ssd = SsdTier(folder, size, engine.host_pool, kind)
        logger.info(
            "KV offload: %d of %d pages are held by %s", ssd.num_used, ssd.num_places, folder
        )
    return Offload(HostTier(slots), CostModel(page_bytes, memory.page_size), ssd)
