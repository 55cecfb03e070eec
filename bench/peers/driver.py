"""What the scripts of this folder share: how a peer is given its work and tells what it took.

A script runs in the peer's own environment, so this module needs nothing but Python:

    PYTHON bench/peers/vllm_peer.py WORK.json RESULT.json

WORK.json, written by bench/compare.py: `model`, a folder; `dtype`; `device`, cpu or cuda;
`threads`, of a CPU; `max_model_len`; `options` for the constructor; `warm_up` and `requests`, lists
of {"prompt_token_ids", "output_len"}; `rounds`, how often the requests are run.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

Request = dict[str, Any]
# All requests at once -> the tokens of each, as many as it asked for, chosen greedily.
Generate = Callable[[list[Request]], list[list[int]]]


def drive(load: Callable[[dict[str, Any]], Generate], packages: list[str]) -> None:
    """Loads the peer, runs the work and writes the result, with the versions of `packages`.

    Raises RuntimeError when a request did not get all of its tokens.
    """
    work = json.loads(Path(sys.argv[1]).read_text())
    begin = perf_counter()
    generate = load(work)
    loaded = perf_counter()
    _checked(work["warm_up"], generate(work["warm_up"]))
    seconds = []
    tokens: list[list[int]] = []
    for _ in range(work["rounds"]):
        start = perf_counter()
        outputs = generate(work["requests"])
        seconds.append(perf_counter() - start)
        tokens = _checked(work["requests"], outputs)
    result = {
        "versions": {"python": platform.python_version()}
        | {package: metadata.version(package) for package in packages},
        "load_seconds": loaded - begin,
        "seconds": seconds,
        "tokens": tokens,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def _checked(requests: list[Request], outputs: list[list[int]]) -> list[list[int]]:
    for index, (request, ids) in enumerate(zip(requests, outputs, strict=True)):
        if len(ids) != request["output_len"]:
            raise RuntimeError(
                f"request {index} generated {len(ids)} tokens instead of {request['output_len']}"
            )
    return outputs
