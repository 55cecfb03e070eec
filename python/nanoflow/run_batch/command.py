"""The command `nanoflow run-batch`."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from nanoflow.arguments import add_engine_arguments
from nanoflow.async_llm import AsyncLLM
from nanoflow.bench.default_model import llm_arguments
from nanoflow.progress import logs_beside_bar
from nanoflow.run_batch.driver import BatchRun, Tally, stop_on_signals
from nanoflow.run_batch.files import OutputFile

STOPPED = 143  # exit status after a signal, with requests left


def add_run_batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_batch)
    parser.add_argument("-i", "--input-file", type=Path, required=True, help="requests, JSONL")
    parser.add_argument(
        "-o",
        "--output-file",
        type=Path,
        required=True,
        help="answers, JSONL, as they come; a file of an earlier run is continued",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew")
    parser.add_argument("--served-model-name", nargs="+", help="what requests call the model")
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=60.0,
        help="seconds that running requests have after SIGTERM or Ctrl-C (default: 60)",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    add_engine_arguments(parser)


def run_batch(options: argparse.Namespace) -> None:
    """Exits with 143 when a signal left requests unanswered; the next run continues."""
    if not options.input_file.is_file():
        raise FileNotFoundError(f"--input-file {options.input_file} is no file")
    if not options.shutdown_timeout >= 0:
        raise ValueError(f"--shutdown-timeout {options.shutdown_timeout} must be at least 0")
    if options.overwrite:
        options.output_file.unlink(missing_ok=True)
    begin = time.perf_counter()
    with OutputFile(options.output_file) as output:
        before = output.num_done
        tally = asyncio.run(_run(options, output))
    print(
        f"{tally.answered} requests answered in {time.perf_counter() - begin:.1f} s, "
        f"{tally.failed} of them with an error; {before} had been before"
    )
    if tally.is_stopped:
        print("stopped with requests left: run the same command again to continue")
        raise SystemExit(STOPPED)


async def _run(options: argparse.Namespace, output: OutputFile) -> Tally:
    arguments = llm_arguments(options)
    llm = AsyncLLM(**arguments)
    try:
        tokenizer = None if llm.args.skip_tokenizer_init else await llm.get_tokenizer()
        names = options.served_model_name or [str(arguments["model"])]
        bar = tqdm(
            desc="Answered", initial=output.num_done, disable=options.no_progress, unit=" requests"
        )
        with bar, logs_beside_bar(not options.no_progress):
            run = BatchRun(llm, tokenizer, names, output, lambda: bar.update(1))
            stop_on_signals(run)
            return await run.run(
                options.input_file, 4 * llm.limits.max_num_seqs, options.shutdown_timeout
            )
    finally:
        llm.shutdown()
