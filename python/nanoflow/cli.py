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


def make_parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(prog="nanoflow", description="LLM serving by overlapped nano-batches.")
    parser.add_argument("--version", action="version", version=f"nanoflow {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="", required=True)
    add_bench_arguments(commands.add_parser("bench", help="measure throughput"))
    add_chat_arguments(commands.add_parser("chat", help="talk to a model in the terminal"))
    add_run_batch_arguments(
        commands.add_parser("run-batch", help="answer a file of requests in OpenAI's batch format")
    )
    add_plan_arguments(commands.add_parser("plan", help="show what a schedule does with a step"))
    add_export_arguments(
        commands.add_parser("export-spec", help="write a model as programs in C++ read it")
    )
    add_tune_arguments(
        commands.add_parser("tune", help="measure the device, and find the fastest schedule for it")
    )
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
