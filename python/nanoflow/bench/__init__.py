"""Benchmarks: `python -m nanoflow.bench` and its subcommands."""
