"""What a result says beside its rates, and the file it goes to."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoflow.bench import environment
from nanoflow.bench.gpu_profile import Profile
from nanoflow.bench.steady import SteadyState
from nanoflow.bench.telemetry import Power
from nanoflow.config import EngineArgs, EngineLimits
from nanoflow.memory import MemoryUse
from nanoflow.models.config import ModelConfig

USUAL_MODEL = "llama-3.1-8b"  # results of other models have the model in their files' names


def gpu_name(device_description: str) -> str | None:
    """ "NVIDIA H100 80GB HBM3" of "cuda:0 (NVIDIA H100 80GB HBM3, 132 SMs)"; None for a CPU."""
    match = re.match(r"cuda:\d+ \((.+), \d+ SMs\)", device_description)
    return match and match[1]


def gpu_folder(gpu: str | None) -> str:
    """ "h100" of "NVIDIA H100 80GB HBM3": the first word with a digit."""
    if gpu is None:
        return "cpu"
    words = [word for word in gpu.split() if re.search(r"\d", word)]
    return (words or gpu.split())[0].lower()


def schedule_name(args: EngineArgs) -> str:
    """A built-in schedule's name, a file's without its suffix, or an object's id."""
    if isinstance(args.schedule, str | Path):
        return Path(args.schedule).stem
    return args.schedule.id


def result_path(folder: Path, result: dict[str, Any]) -> Path:
    """folder/<gpu>/<workload>-<schedule>.json; "-whole" for a whole run."""
    model = "" if result["model"] == USUAL_MODEL else f"{result['model']}-"
    ranks = result.get("tensor_parallel_size", 1)
    model += f"tp{ranks}-" if ranks > 1 else ""
    model += "simulated-" if str(result.get("network")).startswith("none") else ""
    kind = "-whole" if result["measured"] == "whole run" else ""
    name = f"{model}{result['workload']}-{result['schedule']}{kind}.json"
    return folder / gpu_folder(result["gpu"]) / name


def write(path: Path, content: Any, *, appends: bool = False) -> None:
    """As JSON; makes the folder. With `appends`, one line behind those of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=None if appends else 2) + "\n"
    with path.open("a" if appends else "w", encoding="utf-8") as file:
        file.write(text)


def energy(
    power: Power | None, reason: str | None, tokens_per_second: float | None
) -> dict[str, Any]:
    """Power and clock beside the rate they were measured at; `reason` says why there are none."""
    if power is None:
        why = reason or "too short for two samples"
        return {"watts": None, "sm_mhz": None, "j_per_token": None, "telemetry_reason": why}
    return {
        "watts": power.watts,
        "sm_mhz": power.sm_mhz,
        "j_per_token": power.watts / tokens_per_second if tokens_per_second else None,
    }


def kernels(profile: Profile | None, reason: str | None) -> dict[str, Any]:
    if profile is None:
        none: dict[str, Any] = {"kernel_sum_ms": None, "gpu_idle_pct": None, "profile": None}
        return none | {"profile_reason": reason}
    return {
        "kernel_sum_ms": profile.kernel_sum_ms,
        "gpu_idle_pct": profile.gpu_idle_pct,
        "profile": profile.to_json(),
    }


def matrix_tflops(model: ModelConfig, state: SteadyState) -> float:
    """TFLOP/s of the matrix products with weights that the window's tokens took, on all ranks.

    Every token but a request's last passes through all layers; what is sampled, through the head.
    """
    output = state.output_tokens
    rows = state.prompt_tokens + output * (1 - 1 / state.mean_output)
    return matrix_flop(model, rows, output) / state.seconds * 1e-12


def matrix_flop(model: ModelConfig, rows: float, sampled: float) -> float:
    """Of the products of so many rows with all layers, and of so many with the head."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    mlp = max(1, model.experts_per_token) * 3 * model.intermediate_size + model.num_experts
    layer = (heads + mlp) * model.hidden_size
    head = model.vocab_size * model.hidden_size
    return 2 * (rows * model.num_layers * layer + sampled * head)


def _network(args: EngineArgs) -> str | None:
    """How the ranks' data go to the others; None for a rank alone."""
    if args.simulated_tensor_parallel_size > 1:
        return "none: one rank alone, which copies its own data where collectives would be"
    return "collectives" if args.tensor_parallel_size > 1 else None


def circumstances(
    args: EngineArgs,
    limits: EngineLimits,
    memory: MemoryUse,
    device_description: str,
    commit: str | None,
) -> dict[str, Any]:
    """Where, with what and by which command it was measured."""
    return {
        "gpu": gpu_name(device_description),
        "model": Path(args.model).name.removesuffix(".gguf"),
        "model_id": environment.without_folders(str(args.model)),
        "schedule": schedule_name(args),
        "tensor_parallel_size": args.ranks,
        "network": _network(args),
        "seed": args.seed,
        "limits": asdict(limits) | {"kv_tokens": limits.num_pages * limits.page_size},
        "memory": asdict(memory),
        "device": f"{device_description}; {environment.cpu_model()}",
        **environment.origin(commit),
    }
