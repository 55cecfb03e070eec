"""How the memory of a device is shared out."""

from __future__ import annotations

from dataclasses import dataclass

# For what appears when steps run: captured graphs, and kernels that the driver loads at their
# first use. A few dozen graphs of a 32-layer model take a part of it.
GRAPH_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of a device: measured as they were taken, but for `graphs`, which are reserved."""

    device: str
    total: int
    in_use: int  # before: by the driver and by other processes
    weights: int
    workspace: int  # activations, tables, and what the lanes of the schedule take
    graphs: int
    kv_cache: int = 0
    num_pages: int = 0
    page_size: int = 0  # tokens

    @property
    def kind(self) -> str:
        """cpu or cuda."""
        return self.device.partition(":")[0]

    @property
    def own(self) -> int:
        """What the engine takes beside the KV cache."""
        return self.weights + self.workspace + self.graphs

    @property
    def left(self) -> int:
        return self.total - self.in_use - self.own - self.kv_cache

    @property
    def tokens(self) -> int:
        """What the KV cache holds."""
        return self.num_pages * self.page_size

    def table(self) -> str:
        """Aligned lines in MiB that add up to the total."""
        pages = f"{self.num_pages:,} pages, {self.tokens:,} tokens" if self.num_pages else ""
        rows = (
            ("total", self.total, ""),
            ("in use before", self.in_use, "the driver and other processes"),
            ("weights", self.weights, ""),
            ("workspace", self.workspace, ""),
            ("graphs", self.graphs, "reserved"),
            ("KV cache", self.kv_cache, pages),
            ("left", self.left, ""),
        )
        lines = [f"Memory of {self.device}, MiB"]
        for name, size, remark in rows:
            if name == "graphs" and size == 0:  # a CPU has none
                continue
            lines.append(f"  {name:<14}{size / (1 << 20):>12,.0f}  {remark}".rstrip())
        return "\n".join(lines)
