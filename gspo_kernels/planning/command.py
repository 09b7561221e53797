"""`python -m gspo_kernels plan`."""

from __future__ import annotations

import argparse

SUMMARY = "Peak memory and products of a loss, beside plain torch's, and the longest batch that fits."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, required=True, help="rows of the logits")


def run(options: argparse.Namespace) -> int:
    raise NotImplementedError
