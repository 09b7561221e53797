"""A million tokens of context through `linear_gspo_loss`: does its memory grow with the context?

    python -m benchmarks.context                          16 minutes; writes results/context-cpu-<name>.json
    python -m benchmarks.context --smoke                  tiny sizes
    python -m benchmarks.context --markdown [file.json]   the table, from results; `linear --write` puts it on the page

V = 151,936 as usual. On a CPU hidden states are so narrow that a million rows take minutes; on a GPU they are as wide
as a model's (`on_gpu` is a part of `gpu.py`). Every sequence is longer than a
chunk: the logits of its rows are computed twice. All rows have a coefficient. What a loss must hold grows with its
arguments: the gradient of the hidden states, and some numbers a row. What it holds beside these must not grow.
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gspo_kernels import linear_gspo_loss

from . import gpu_parts
from .gpu_meter import finish, meter_of
from .gpu_model import Plan, Work
from .gpu_parts import table
from .results import arguments_of, default_path, load, machine, newest, save, size, title
from .sampled import SEED

KIND = "context-cpu"
# Bytes: a bound of what the package holds of each row beside the gradient of the hidden states. By torch's profiler it
# is 95 for one sequence: 16 of statistics, 38 of sequence numbers, masks and shares, and 41 of temporary numbers in
# float64 while the coefficients of a whole sequence are computed.
A_ROW = 128

# How to read the numbers; stored with them.
MEANINGS = {
    "seconds": "of a loss and its gradients",
    "extra_bytes": "peak resident memory beyond the arguments, returned gradients included",
    "beside": "extra_bytes less the gradients of hidden states and head: a chunk, and some numbers a row",
}


@dataclass(frozen=True)
class Context:
    """A batch of packed sequences of one length."""

    sequences: int
    length: int
    width: int
    vocab: int
    chunk_bytes: int | None = None
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        return self.sequences * self.length


WHOLE = tuple(Context(n, length, 16, 151_936) for n, length in ((2, 32_768), (32, 32_768), (1, 1_048_576)))
SMOKE = tuple(Context(n, length, 16, 1_000, 1 << 20) for n, length in ((2, 1_024), (8, 1_024), (1, 8_192)))


def on_gpu(part: gpu_parts.Context) -> bool:
    """Arguments: the items, <sequences>x<length>."""
    if not part.smoke:
        measured(Context(1, 4_096, 4_096, 151_936, dtype="bfloat16"), part.device)  # kernels are compiled and loaded
    for item in part.arguments:
        sequences, _, length = item.partition("x")
        context = Context(int(sequences), int(length), 4_096, 151_936, dtype="bfloat16")
        part.at(f"context of {item}")
        found = measured(SMOKE[0] if part.smoke else context, part.device)
        part.put("linear", "contexts", item, value=found)
        part.say(f"context of {item}: {found['seconds']:.2f} s, {size(found['extra_bytes'])}")
        part.finished(item)
    return True


def measured(context: Context, device: str = "cpu") -> dict[str, Any]:
    generator, meter = torch.Generator(device).manual_seed(SEED), meter_of(device)
    made: dict[str, Any] = {"generator": generator, "device": device}
    dtype = getattr(torch, context.dtype)
    hidden = torch.randn(context.rows, context.width, dtype=dtype, **made).mul_(0.1).requires_grad_()
    weight = torch.randn(context.vocab, context.width, dtype=dtype, **made).mul_(0.1).requires_grad_()
    token_ids = torch.randint(context.vocab, (context.rows,), **made)
    with torch.no_grad():
        # The logits of a row are nearly normal with this deviation, which gives their logsumexp.
        deviation = weight.float().square().mean().sqrt() * torch.linalg.vector_norm(hidden, dim=1).float()
        of_token = (hidden * weight[token_ids]).sum(1, dtype=torch.float32)
        old = of_token - math.log(context.vocab) - deviation.square() / 2
    advantages = torch.ones(context.sequences, device=device)
    boundaries = torch.arange(context.sequences + 1, device=device) * context.length
    options = {"eps_low": 0.1, "eps_high": 0.1, "cu_seqlens": boundaries, "chunk_bytes": context.chunk_bytes}

    def run() -> Any:
        began = time.perf_counter()
        loss, stats = linear_gspo_loss(hidden, weight, token_ids, advantages, old, **options)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        finish()
        return time.perf_counter() - began, gradients, stats

    (seconds, gradients, stats), extra = meter.peak_extra_bytes(run)
    returned = sum(x.numel() * x.element_size() for x in gradients)
    assert float(stats.clip_fraction) == 0.0 and all(bool(x.isfinite().all()) for x in gradients)
    return {
        **asdict(context),
        "seconds": seconds,
        "extra_bytes": extra,
        "beside": None if extra is None else max(extra - returned, 0),
    }


def markdown(content: dict[str, Any]) -> str:
    rows = [
        [
            f"{m['sequences']:,} of {m['length']:,} tokens",
            f"{m['seconds']:,.1f} s",
            f"{m['seconds'] / (m['sequences'] * m['length']) * 1e6:.0f} us",
            size(m["extra_bytes"]),
            size(m["beside"]),
        ]
        for m in content["contexts"]
    ]
    about, first = content["machine"], content["contexts"][0]
    heads = [f"V = {first['vocab']:,}, D = {first['width']}, fp32", "time", "a row", "peak", "beside the gradients"]
    on_gpu = Work(Plan("", "recompute", trained=True), rows=1_048_576, vocab=151_936, width=4_096)
    return "\n".join(
        [
            f"A long context on {about['cores']} cores of {about['cpu']} (`make bench-context`):",
            "",
            *table(heads, rows),
            "",
            f"By the model of docs/gpu.md, 1,048,576 rows with D = 4,096 in bf16 take {size(on_gpu.estimate.peak)} of "
            f"a GPU, returned gradients included, beside the operands ({size(on_gpu.shape.operand_bytes)}).",
        ]
    )


def grows(contexts: Sequence[dict[str, Any]]) -> str:
    """What is wrong, or "": beside its gradients, the longest context holds `A_ROW` bytes a row more than the first."""
    first = contexts[0]
    for other in contexts[1:]:
        more = other["sequences"] * other["length"] - first["sequences"] * first["length"]
        if first["beside"] is not None and other["beside"] > first["beside"] * 1.05 + more * A_ROW:
            return f"{other['beside']:,} bytes beside the gradients, where {first['beside']:,} are held of {first}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_of("context", __doc__, KIND).parse_args(arguments)
    if options.markdown is not None:
        print(markdown(load(options.markdown if options.markdown.name else newest(KIND))))
        return 0
    about = machine()
    print(title(about), flush=True)
    contexts = []
    for context in SMOKE if options.smoke else WHOLE:
        contexts.append(measured(context) if options.smoke else _in_a_process(context))
        print(contexts[-1], flush=True)
    content = {"machine": about, "meanings": MEANINGS, "contexts": contexts}
    print("", markdown(content), sep="\n")
    path = options.save or (None if options.smoke else default_path(KIND))
    if path:
        save(path, content)
        print(f"\nresults: {path}")
    wrong = "" if options.smoke else grows(contexts)
    if wrong:
        print(f"\nmemory grows with the context: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def _in_a_process(context: Context) -> dict[str, Any]:
    """With a heap of its own: what another context has freed would hide what this one needs."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(measured, context).result()


if __name__ == "__main__":
    sys.exit(main())
