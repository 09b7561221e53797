"""`python -m gspo_kernels plan`."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
from collections.abc import Callable

import torch

from ..losses.clipped import GMPO, GRPO, GSPO, PPO, SAPO, GSPOToken
from ..losses.objectives import Objective
from ..losses.weighted import CISPO, DPPO, DRO, TOPR, TOPRToken
from ..rows import cpu_rows
from .plan import Plan, plan_of
from .shape import Shape, even_batch
from .text import render, size

SUMMARY = "Peak memory and products of a loss, beside plain torch's, and the longest batch that fits."

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "gspo": GSPO, "gspo-token": GSPOToken, "grpo": GRPO, "ppo": PPO, "cispo": CISPO, "dppo": DPPO, "dro": DRO,
    "gmpo": GMPO, "sapo": SAPO, "topr": TOPR, "topr-token": TOPRToken,
}  # fmt: skip
_RESPONSES = 32
_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_MEMORY_OF_A_GPU = 80 * 10**9  # where none is here


class Refused(Exception):
    """Options that do not go together; the message is for people."""


# ---- options


def whole_number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0; got {text!r}")
    return int(text)


def share_above_0(text: str) -> float:
    found = _number(text)
    if not 0.0 < found <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a share above 0, at most 1; got {text!r}")
    return found


def share_below_1(text: str) -> float:
    found = _number(text)
    if not 0.0 <= found < 1.0:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to less than 1; got {text!r}")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def memory_size(text: str) -> int:
    """80GB is 80 x 10^9 bytes, 80GiB is 80 x 2^30."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]+)", text.lower())
    if match is None or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(
            f"expected a number and a unit, such as 80GB (80 x 10^9 bytes) or 80GiB (80 x 2^30 bytes); got {text!r}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    batch = parser.add_argument_group("the batch")
    batch.add_argument(
        "--tokens", type=whole_number, required=True, metavar="N", help="rows of hidden states, masked ones included"
    )
    lengths = batch.add_mutually_exclusive_group()
    lengths.add_argument(
        "--sequences", type=whole_number, metavar="N", help=f"responses, all of one length; {_RESPONSES} by default"
    )
    lengths.add_argument("--length", type=whole_number, metavar="N", help="tokens of a response, instead")
    batch.add_argument(
        "--masked", type=share_below_1, default=0.0, metavar="SHARE",
        help="of the rows: prompts and padding, which are not multiplied; 0 by default",
    )  # fmt: skip
    batch.add_argument(
        "--active", type=share_above_0, default=1.0, metavar="SHARE",
        help="of the unmasked rows: those with a gradient, neither clipped nor of advantage 0; 1 by default",
    )  # fmt: skip
    batch.add_argument(
        "--skip-zero-advantage", action="store_true",
        help="all other rows are of responses with advantage 0, and the loss leaves them out",
    )  # fmt: skip
    batch.add_argument(
        "--kept", type=whole_number, metavar="K", help="columns of a row that top-p, top-k or min-p keep"
    )
    head = parser.add_argument_group("the head and the loss")
    head.add_argument("--vocab", type=whole_number, required=True, metavar="V", help="rows of the head")
    head.add_argument("--hidden", type=whole_number, required=True, metavar="D", help="width of the hidden states")
    head.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of hidden states, head and logits; bf16 by default"
    )
    head.add_argument("--frozen-head", action="store_true", help="the head needs no gradient")
    head.add_argument("--tp", type=whole_number, default=1, metavar="RANKS", help="over which the head is sharded")
    head.add_argument("--objective", choices=OBJECTIVES, default="gspo", help="gspo by default")
    head.add_argument("--on-policy", action="store_true", help="without old_logprobs")
    head.add_argument("--chunk-bytes", type=whole_number, metavar="BYTES", help="as the argument of a loss")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--device", choices=("cuda", "cpu"), help="what to plan for; by default what is here")
    memory.add_argument(
        "--memory",
        type=memory_size,
        metavar="SIZE",
        help="of the device, such as 80GB or 80GiB; by default what is here",
    )
    memory.add_argument(
        "--reserved", type=memory_size, default=0, metavar="SIZE",
        help="what the rest takes: the model without its head, its optimizer, activations; 0 by default",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the numbers, in bytes")


# ---- the plan


def run(options: argparse.Namespace) -> int:
    try:
        plan = plan_for_options(options)
    except (Refused, ValueError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(plan.as_dict(), indent=2))
    else:
        print(f"{_what(options, plan)}\n\n{render(plan)}")
    return 0


def plan_for_options(options: argparse.Namespace) -> Plan:
    """Raises Refused; ValueError where a loss would refuse `chunk_bytes`."""
    device = options.device or device_here()
    memory = options.memory or memory_of(device)
    sequences = options.sequences or min(_RESPONSES, options.tokens)
    if options.length is not None:
        sequences = -(-options.tokens // options.length)
    if sequences > options.tokens:
        raise Refused(f"--sequences: expected at most {options.tokens:,}, one for each token; got {sequences:,}")
    if options.kept is not None and options.kept > options.vocab:
        raise Refused(f"--kept: expected at most {options.vocab:,}, the columns that there are; got {options.kept:,}")
    if options.tp > options.vocab:
        raise Refused(
            f"--tp: expected at most {options.vocab:,} ranks, one for each row of the head; got {options.tp:,}"
        )
    even = functools.partial(
        even_batch, masked=options.masked, active=options.active, skip_zero_advantage=options.skip_zero_advantage
    )
    shape = Shape(
        even(options.tokens, sequences), -(-options.vocab // options.tp), options.hidden, DTYPES[options.dtype], device,
        frozen_head=options.frozen_head, on_policy=options.on_policy, chunk_bytes=options.chunk_bytes,
        sharded=options.tp > 1, kept=options.kept or 0, objective=OBJECTIVES[options.objective](),
    )  # fmt: skip
    free, head = memory - options.reserved, shape.vocab * shape.width * shape.dtype.itemsize
    if free < head:
        raise Refused(
            f"--memory: expected at least {size(head + options.reserved)}, for the head ({size(head)}) and what is "
            f"reserved ({size(options.reserved)}); got {size(memory)}, {size(head - free)} too little"
        )
    length = options.length or -(-options.tokens // sequences)
    return plan_of(shape, length, free, lambda responses: even(responses * length, responses))


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def memory_of(device: str) -> int:
    if device == "cpu":
        if not hasattr(os, "sysconf"):
            raise Refused("--memory: expected the size of the memory, which this system does not tell; got none")
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        return _MEMORY_OF_A_GPU
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)


def _what(options: argparse.Namespace, plan: Plan) -> str:
    """What the numbers are for, with the defaults that were taken."""
    shape = plan.shape
    batch = [f"{options.tokens:,} tokens in {len(shape.batch.lengths):,} responses of {plan.length:,}"]
    if options.masked:
        batch.append(f"{options.masked:.0%} masked")
    if options.active < 1.0 and options.skip_zero_advantage:
        batch.append(f"{options.active:.0%} of the responses with an advantage, the others left out")
    elif options.active < 1.0:
        batch.append(f"{options.active:.0%} of the unmasked rows with a gradient")
    head = [
        f"V = {shape.vocab:,}" + (f" on each of {options.tp:,} ranks" if shape.sharded else ""),
        f"D = {shape.width:,}",
        options.dtype,
        type(shape.objective).__name__,
        "on-policy" if shape.on_policy else "off-policy",
        "head frozen" if shape.frozen_head else "head trained",
    ]
    memory = f"memory of {size(plan.memory + options.reserved)}"
    if options.memory is None and shape.device == "cuda" and device_here() != "cuda":
        memory += " (assumed)"
    if options.reserved:
        memory += f", of which {size(options.reserved)} are reserved"
    lines = [", ".join(batch), ", ".join(head), f"planned for {_where(options.device)}; {memory}"]
    if shape.device == "cpu" and (missing := cpu_rows.unavailable_reason()):
        lines.append(f"rows run in plain torch here and take more than is planned: {missing}")
    return "\n".join(
        [*lines, f"Beside hidden states and head, {size(shape.operand_bytes)}, which every way begins with:"]
    )


def _where(device: str | None) -> str:
    here = device_here()
    if device is None:
        return "cuda, which is here" if here == "cuda" else "cpu, because no GPU is here (--device cuda plans for one)"
    return "cuda (no GPU is here)" if device == "cuda" != here else device
