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
CONTEXT_STATS = DATA_STATS = 12
SLIME_COLLECTIVES = 2  # a response: new and old log-probabilities
MEGATRON_SUMS = 2  # predicted logit and sum of exponentials, in one all-reduce where Megatron fuses them


@dataclass(frozen=True)
class Step:
    """One optimizer step over `responses` of `tokens` each, one response a micro-batch; prompts are not counted.

    Ranks share the vocabulary (tensor), the tokens of a response (context), and the responses of a step (data). The
    model is Qwen3-30B-A3B, whose head is not tied to the embedding.
    """

    tensor: int
    context: int
    data: int
    responses: int = 512  # 64 prompts x 8
    tokens: int = 32_768
    hidden: int = 2_048
    vocabulary: int = 151_936

    @property
    def gpus(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def micro_batches(self) -> int:
        """Responses that a GPU has a part of."""
        return self.responses // self.data

    @property
    def rows_of_response(self) -> int:
        return self.tokens // self.context

    @property
    def rows(self) -> int:
        return self.micro_batches * self.rows_of_response


# 4 heads of keys and values: tensor parallelism of 4 cuts none of them.
STEPS = [Step(4, 2, 1), *(Step(4, 4, data) for data in (1, 2, 4, 8, 16, 32))]


def all_gather(bytes_a_rank: float, ranks: int) -> float:
    return (ranks - 1) * bytes_a_rank


def all_reduce(bytes_a_rank: float, ranks: int) -> float:
    """By a ring: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) / ranks * bytes_a_rank


# ---- over the vocabulary: other implementations first, then this package


def gathered_logits(step: Step) -> float:
    return all_gather(step.rows * step.vocabulary * BF16 / step.tensor, step.tensor)


def megatron_cross_entropy(step: Step) -> float:
    return all_reduce(step.rows * FP32, step.tensor) + all_reduce(step.rows * MEGATRON_SUMS * FP32, step.tensor)


def our_rows(step: Step) -> float:
    return all_gather(step.rows * ROW_STATISTICS, step.tensor)


def hidden_gradient(step: Step) -> float:
    """What a loss from hidden states adds to `our_rows`: each rank has its slice's part of the hidden gradient."""
    return all_reduce(step.rows * step.hidden * FP32, step.tensor)


# ---- over context


def slime_log_probs(step: Step) -> float:
    """Each rank's log-probabilities, zeros around them, summed over the ranks."""
    return SLIME_COLLECTIVES * step.micro_batches * all_reduce(step.tokens * FP32, step.context)


def gathered_log_probs(step: Step) -> float:
    """Of the new policy alone."""
    return all_gather(step.rows * FP32, step.context)


def our_sequences(step: Step) -> float:
    """A call is a micro-batch, which is one response: its sums, and the stats."""
    return step.micro_batches * all_gather((SEQUENCE_SUMS + CONTEXT_STATS) * FP64, step.context)


# ---- over data


def our_count(step: Step) -> float:
    """The global count, and the stats of the step."""
    return all_gather(FP64 + DATA_STATS * FP32, step.data)


# ---- memory, and the tables


def logits_of_response(step: Step, tensor: int = 1) -> float:
    """Memory that a response's logits in bf16 take on one GPU: whole, or a slice of 1 / tensor of the vocabulary."""
    return step.rows_of_response * step.vocabulary * BF16 / tensor


def readable(count: float) -> str:
    """Three digits, in powers of 1000, as network speeds are given."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    digits = f"{count:.0f}" if count == int(count) else f"{count:#.3g}".rstrip(".")
    return f"{digits} {units[0]}"


def markdown() -> list[str]:
    """The tables of docs/parallel.md: over the vocabulary, over context and data, memory."""

    def bytes_of(count: Callable[[Step], float]) -> Callable[[Step], str]:
        return lambda step: readable(count(step))

    layout: dict[str, Callable[[Step], str]] = {
        "GPUs": lambda step: f"{step.gpus}",
        "tp x cp x dp": lambda step: f"{step.tensor} x {step.context} x {step.data}",
    }
    over_vocabulary = layout | {
        "logits gathered": bytes_of(gathered_logits),
        "Megatron's cross entropy": bytes_of(megatron_cross_entropy),
        "ours, from logits": bytes_of(our_rows),
        "ours, from hidden states": lambda step: f"the same + {readable(hidden_gradient(step))}",
    }
    over_context_and_data = layout | {
        "slime, cp": bytes_of(slime_log_probs),
        "log-probs gathered, cp": bytes_of(gathered_log_probs),
        "ours, cp": bytes_of(our_sequences),
        "ours, dp": bytes_of(our_count),
    }
    memory: dict[str, Callable[[Step], str]] = {
        "cp": lambda step: f"{step.context}",
        "rows a GPU": lambda step: f"{step.rows_of_response:,}",
        "gathered": bytes_of(logits_of_response),
        "with their gradient": lambda step: readable(2 * logits_of_response(step)),
        f"a slice of 1/{STEPS[0].tensor}": lambda step: readable(logits_of_response(step, step.tensor)),
    }
    return [_table(over_vocabulary, STEPS), _table(over_context_and_data, STEPS), _table(memory, STEPS[:2])]


def _table(columns: dict[str, Callable[[Step], str]], steps: list[Step]) -> str:
    rows = [list(columns), *([cell(step) for cell in columns.values()] for step in steps)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    lines.insert(1, "|" + "--:|" * len(columns))
    return "\n".join(lines)


if __name__ == "__main__":
    print(*markdown(), sep="\n\n")
