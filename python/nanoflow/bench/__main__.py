"""`python -m nanoflow.bench`."""

import sys

from nanoflow.arguments import ArgumentParser
from nanoflow.bench.command import add_bench_arguments
from nanoflow.cli import run_command

if __name__ == "__main__":
    parser = ArgumentParser(prog="python -m nanoflow.bench", description="Measure nanoflow.")
    add_bench_arguments(parser)
    sys.exit(run_command(parser))
