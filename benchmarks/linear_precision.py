"""Who decides rightly which sequences are clipped, from bf16 hidden states and a bf16 head.

    python -m benchmarks.linear_precision                             a minute; writes linear-precision-cpu-<name>.json
    python -m benchmarks.linear_precision --smoke                     tiny sizes
    python -m benchmarks.linear_precision --markdown [results.json]   the table of docs/hidden-states.md, from results

GSPO clips at a ratio 0.0003 below or 0.0004 above 1. The ratio comes from a mean over tokens of new less old
log-probabilities, both of which a trainer takes from the same function; so does this: each contestant's own, of hidden
states before and after a small move. Truth is float64 of the same bf16 numbers. The move is such that the logarithm of
the true ratio is 0.0005 in size on average, and both signs of advantages occur.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gspo_kernels

from . import libraries
from .cases import EPSILONS
from .contestants import Unfit
from .gpu_parts import table
from .race import words
from .results import arguments_of, default_path, machine, newest, save, title
from .sampled import SEED, exact_logprobs, likely_hidden

KIND = "linear-precision-cpu"
SEQUENCES = 64
MOVES = {32: 2.1e-3, 128: 4.0e-3, 512: 8.0e-3}  # by length: deviation of what is added to each hidden state
WIDTH, VOCAB = 512, 8_192
SMOKE_MOVES, SMOKE_WIDTH, SMOKE_VOCAB = {8: 1.2e-3}, 64, 512

# How to read the numbers; stored with them.
MEANINGS = {
    "rms": "root mean square of the error of a new log-probability",
    "log_ratio_error": "mean size of the error of the logarithm of a sequence's ratio",
    "wrong": "sequences that are clipped and should not be, or are not and should be",
    "true_log_ratio": "mean size of the true one",
    "truly_clipped": "sequences that should be clipped",
}


def ours() -> libraries.Logprobs:
    return lambda hidden, weight, token_ids: gspo_kernels.linear_token_logprobs(hidden, weight, token_ids).logprobs


CONTESTANTS: dict[str, tuple[str, Callable[[], libraries.Logprobs]]] = {
    "ours": ("gspo-kernels", ours),
    "eager": ("torch eager: bf16 logits, fp32 softmax", libraries.materialised),
    "cce": ("cut-cross-entropy, torch_compile", libraries.cut_cross_entropy),
    "liger": ("Liger, inside of its fused linear GRPO", libraries.liger),
    "trl": ("TRL, chunked log-probabilities", libraries.trl),
    "verl": ("verl, FusedLinearForPPO", libraries.verl),
    "torch": ("torch linear_cross_entropy, chunked", libraries.torch_chunked),
}


@dataclass(frozen=True)
class Moved:
    old: Tensor  # [sequences, T, width], bf16 unless `build` was given another dtype
    new: Tensor
    weight: Tensor  # [vocab, width]
    token_ids: Tensor  # [sequences, T]
    advantages: Tensor  # [sequences]
    logprobs: Tensor  # [sequences, T] float64: true ones after the move
    log_ratio: Tensor  # [sequences] float64: true ones


def build(length: int, move: float, width: int, vocab: int, dtype: torch.dtype = torch.bfloat16) -> Moved:
    generator = torch.Generator().manual_seed(SEED)
    rows = SEQUENCES * length
    weight = torch.randn(vocab, width, generator=generator).mul_(2.0 / math.sqrt(width))
    token_ids = torch.randint(vocab, (rows,), generator=generator)
    hidden = likely_hidden(weight, token_ids, generator)
    weight, old = weight.to(dtype), hidden.to(dtype)
    new = (old.float() + move * torch.randn(rows, width, generator=generator)).to(dtype)
    before, after = (exact_logprobs(x, weight, token_ids)[0].view(SEQUENCES, length) for x in (old, new))
    return Moved(
        old=old.view(SEQUENCES, length, width),
        new=new.view(SEQUENCES, length, width),
        weight=weight,
        token_ids=token_ids.view(SEQUENCES, length),
        advantages=torch.tensor([1.0, -1.0]).repeat(SEQUENCES // 2),
        logprobs=after,
        log_ratio=(after - before).mean(1),
    )


def clipped(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    low, high = EPSILONS["gspo"]
    ratio = log_ratio.double().exp()
    return torch.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)


def judge(moved: Moved, logprobs: libraries.Logprobs) -> dict[str, Any]:
    with torch.no_grad():
        old, new = (logprobs(x, moved.weight, moved.token_ids).double() for x in (moved.old, moved.new))
    log_ratio = (new - old).mean(1)
    wrong = clipped(log_ratio, moved.advantages) != clipped(moved.log_ratio, moved.advantages)
    return {
        "rms": float((new - moved.logprobs).square().mean().sqrt()),
        "log_ratio_error": float((log_ratio - moved.log_ratio).abs().mean()),
        "wrong": int(wrong.sum()),
    }


def measure(smoke: bool) -> dict[str, Any]:
    """By length, then by contestant."""
    moves, width, vocab = (SMOKE_MOVES, SMOKE_WIDTH, SMOKE_VOCAB) if smoke else (MOVES, WIDTH, VOCAB)
    lengths: dict[str, Any] = {}
    absent: dict[str, str] = {}
    errors: dict[str, str] = {}
    for length, move in moves.items():
        torch.compiler.reset()
        moved, found = build(length, move, width, vocab), {}
        for name, (_, find) in CONTESTANTS.items():
            try:
                found[name] = judge(moved, find())
            except Unfit as error:
                absent[name] = words(error)
            except Exception as error:
                errors[name] = words(error)
        lengths[str(length)] = {
            "true_log_ratio": float(moved.log_ratio.abs().mean()),
            "truly_clipped": int(clipped(moved.log_ratio, moved.advantages).sum()),
            "contestants": found,
        }
    about, sizes = (
        machine(libraries.PACKAGES),
        {"sequences": SEQUENCES, "width": width, "vocab": vocab, "dtype": "bf16"},
    )
    return {"machine": about, "meanings": MEANINGS, **sizes, "lengths": lengths, "absent": absent, "errors": errors}


def markdown(content: dict[str, Any]) -> list[str]:
    of_lengths = content["lengths"].values()
    rows = []
    for name, (label, _) in CONTESTANTS.items():
        found = [of_length["contestants"].get(name) for of_length in of_lengths]
        if all(found):
            errors = ", ".join(f"{x['log_ratio_error']:.1e}" for x in found)
            rows.append(
                [label, f"{max(x['rms'] for x in found):.1e}", errors, ", ".join(str(x["wrong"]) for x in found)]
            )
    truth = ", ".join(f"{x['true_log_ratio']:.1e}" for x in of_lengths)
    clips = ", ".join(str(x["truly_clipped"]) for x in of_lengths)
    of_log_s = f"of log s, mean, at {', '.join(content['lengths'])} tokens"
    heads = ["error of a log-probability (rms)", of_log_s, f"wrong clips of {SEQUENCES}"]
    sizes = f"D = {content['width']:,}, V = {content['vocab']:,}"
    return table([sizes, *heads], [*rows, ["(the true log s, and clips)", "", truth, clips]])


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_of("linear_precision", __doc__, KIND).parse_args(arguments)
    if options.markdown is not None:
        path = options.markdown if options.markdown.name else newest(KIND)
        print(*markdown(json.loads(path.read_text())), sep="\n")
        return 0
    content = measure(options.smoke)
    print(title(content["machine"]), "", *markdown(content), sep="\n")
    for kind in ("absent", "errors"):
        for name, reason in content[kind].items():
            print(f"{kind}: {CONTESTANTS[name][0]}: {reason.splitlines()[0][:150]}")
    path = options.save or (None if options.smoke else default_path(KIND))
    if path:
        save(path, content)
        print(f"\nresults: {path}")
    return 1 if "ours" in content["absent"] | content["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
