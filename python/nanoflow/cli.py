"""The console command `nanoflow`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nanoflow import __version__
from nanoflow.arguments import ArgumentParser
from nanoflow.bench.command import add_bench_arguments
from nanoflow.bench.default_model import DefaultModelError
from nanoflow.chat import add_chat_arguments
from nanoflow.errors import EngineError
from nanoflow.export_command import add_export_arguments
from nanoflow.plan_command import add_plan_arguments
from nanoflow.run_batch.command import add_run_batch_arguments
from nanoflow.tune.command import add_tune_arguments

_COMMANDS = (
    ("bench", add_bench_arguments, "measure throughput, latency, serving and starts"),
    ("chat", add_chat_arguments, "talk to a model in the terminal"),
    ("run-batch", add_run_batch_arguments, "answer a file of requests in OpenAI's batch format"),
    ("plan", add_plan_arguments, "show what a schedule does with a step"),
    ("export-spec", add_export_arguments, "write a model as programs in C++ read it"),
    ("tune", add_tune_arguments, "measure the device, and find the fastest schedule for it"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="nanoflow", description="LLM serving by overlapped nano-batches.")
    parser.add_argument("--version", action="version", version=f"nanoflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add_arguments, text in _COMMANDS:
        add_arguments(commands.add_parser(name, help=text, description=text))
    return parser


def run_command(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Runs what the arguments choose; its exit status. A caller's mistake is told in one line."""
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, OSError, DefaultModelError, EngineError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(make_parser(), arguments)
