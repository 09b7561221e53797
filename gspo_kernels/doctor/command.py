"""`python -m gspo_kernels`."""

from __future__ import annotations

import argparse

SUMMARY = "Versions, devices, the backends that serve each dtype, and a check of each against float64."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable, for a bug report")


def run(options: argparse.Namespace) -> int:
    raise NotImplementedError
