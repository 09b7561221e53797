"""Bytes on the wire of a sharded loss, by arithmetic: nothing is run. Prints the tables of docs/parallel.md.

    python docs/scripts/wire.py

What one GPU receives in one step, for the loss alone. The model's own collectives and the all-reduce of the gradients
over data-parallel ranks are left out, which are the same whoever computes the loss; and so is the backward of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BF16, FP32, FP64 = 2, 4, 8  # bytes a number
ROW_STATISTICS = FP64 + 2 * FP32  # bytes: logsumexp, entropy part, log-probability of the token where it is
SEQUENCE_SUMS = 2  # 3 with weights
CONTEXT_STATS = 12
DATA_STATS = 12
SLIME_COLLECTIVES = 2  # a response: new and old log-probabilities
MEGATRON_SUMS = 2  # predicted logit and sum of exponentials, in one all-reduce where Megatron fuses them


@dataclass(frozen=True)
class Model:
    name: str
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Layout:
    """Ranks that share the vocabulary, the tokens of a response, and the responses of a step."""

    tensor: int
    context: int
    data: int

    @property
    def gpus(self) -> int:
        return self.tensor * self.context * self.data

    def __str__(self) -> str:
        return f"{self.tensor} x {self.context} x {self.data}"


@dataclass(frozen=True)
class Step:
    """One optimizer step over `responses` of `tokens` each, one response a micro-batch; prompts are not counted."""

    model: Model
    layout: Layout
    responses: int
    tokens: int

    @property
    def micro_batches(self) -> int:
        """Responses that a GPU has a part of."""
        return self.responses // self.layout.data

    @property
    def rows_of_response(self) -> int:
        return self.tokens // self.layout.context

    @property
    def rows(self) -> int:
        return self.micro_batches * self.rows_of_response


# Its head is not tied to the embedding. 4 heads of keys and values: tensor parallelism of 4 cuts none of them.
MODEL = Model("Qwen3-30B-A3B", hidden=2048, vocabulary=151_936)
LAYOUTS = [Layout(4, 2, 1), *(Layout(4, 4, data) for data in (1, 2, 4, 8, 16, 32))]
RESPONSES, TOKENS = 512, 32_768  # 64 prompts x 8
STEPS = [Step(MODEL, layout, RESPONSES, TOKENS) for layout in LAYOUTS]


def all_gather(bytes_a_rank: float, ranks: int) -> float:
    return (ranks - 1) * bytes_a_rank


def all_reduce(bytes_a_rank: float, ranks: int) -> float:
    """By a ring: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) / ranks * bytes_a_rank


# Over the vocabulary. Others' ways first, then ours.


def gathered_logits(step: Step) -> float:
    ranks = step.layout.tensor
    return all_gather(step.rows * step.model.vocabulary * BF16 / ranks, ranks)


def megatron_cross_entropy(step: Step) -> float:
    ranks = step.layout.tensor
    return all_reduce(step.rows * FP32, ranks) + all_reduce(step.rows * MEGATRON_SUMS * FP32, ranks)


def our_rows(step: Step) -> float:
    return all_gather(step.rows * ROW_STATISTICS, step.layout.tensor)


def hidden_gradient(step: Step, bytes_a_number: int = FP32) -> float:
    """What a loss from hidden states adds to `our_rows`: each rank has its slice's part of the hidden gradient."""
    return all_reduce(step.rows * step.model.hidden * bytes_a_number, step.layout.tensor)


# Over context.


def slime_log_probs(step: Step) -> float:
    """Each rank's log-probabilities, zeros around them, summed over the ranks."""
    return SLIME_COLLECTIVES * step.micro_batches * all_reduce(step.tokens * FP32, step.layout.context)


def gathered_log_probs(step: Step) -> float:
    """Of the new policy alone."""
    return all_gather(step.rows * FP32, step.layout.context)


def our_sequences(step: Step) -> float:
    """A call is a micro-batch, which is one response: its sums, and the stats."""
    return step.micro_batches * all_gather((SEQUENCE_SUMS + CONTEXT_STATS) * FP64, step.layout.context)


# Over data.


def our_count(step: Step) -> float:
    """The global count, and the stats of the step."""
    ranks = step.layout.data
    return all_gather(FP64 + DATA_STATS * FP32, ranks)


def logits_of_response(step: Step, tensor: int = 1) -> float:
    """Memory that a response's logits in bf16 take on one GPU: whole, or a slice of 1 / tensor of the vocabulary."""
    return step.rows_of_response * step.model.vocabulary * BF16 / tensor


def readable(count: float) -> str:
    """Three digits, in powers of 1000, as network speeds are given."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{_three_digits(count)} {unit}"
        count /= 1000
    return f"{_three_digits(count)} TB"


def _three_digits(count: float) -> str:
    return f"{count:.0f}" if count == int(count) else f"{count:#.3g}".rstrip(".")


def markdown() -> list[str]:
    """The tables of docs/parallel.md: over the vocabulary, over context and data, memory."""
    return [
        _wire_table(
            {
                "logits gathered": lambda step: readable(gathered_logits(step)),
                "Megatron's cross entropy": lambda step: readable(megatron_cross_entropy(step)),
                "ours, from logits": lambda step: readable(our_rows(step)),
                "ours, from hidden states": lambda step: f"the same + {readable(hidden_gradient(step))}",
            }
        ),
        _wire_table(
            {
                "slime, cp": lambda step: readable(slime_log_probs(step)),
                "log-probs gathered, cp": lambda step: readable(gathered_log_probs(step)),
                "ours, cp": lambda step: readable(our_sequences(step)),
                "ours, dp": lambda step: readable(our_count(step)),
            }
        ),
        _memory_table(),
    ]


def _wire_table(columns: dict[str, Callable[[Step], str]]) -> str:
    rows = [[f"{step.layout.gpus}", f"{step.layout}", *(cell(step) for cell in columns.values())] for step in STEPS]
    return _table(["GPUs", "tp x cp x dp", *columns], rows)


def _memory_table() -> str:
    of_context = {step.layout.context: step for step in STEPS}
    head = ["cp", "rows a GPU", "gathered", "with their gradient", f"a slice of 1/{LAYOUTS[0].tensor}"]
    rows = []
    for context, step in of_context.items():
        whole, part = logits_of_response(step), logits_of_response(step, step.layout.tensor)
        rows.append([f"{context}", f"{step.rows_of_response:,}", readable(whole), readable(2 * whole), readable(part)])
    return _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    lines.insert(1, "|" + "--:|" * len(head))
    return "\n".join(lines)


if __name__ == "__main__":
    print(*markdown(), sep="\n\n")
