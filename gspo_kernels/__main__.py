"""`python -m gspo_kernels`: what runs here, and whether it is right. `plan`: the memory that a batch takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .doctor import command as doctor
from .planning import command as planning


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gspo_kernels", description=doctor.SUMMARY)
    doctor.add_arguments(parser)
    parser.epilog = "Exit code 0: all is right; 1: a check failed; 2: wrong usage."
    commands = parser.add_subparsers(title="commands", metavar="[COMMAND]")
    plan = commands.add_parser("plan", help=planning.SUMMARY, description=planning.SUMMARY)
    planning.add_arguments(plan)
    plan.set_defaults(run=planning.run)
    parser.set_defaults(run=doctor.run)
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    options.json |= "--json" in arguments  # also before the command, whose own default would hide it
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
