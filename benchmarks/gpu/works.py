"""What is timed on a GPU, at which sizes: Qwen3's vocabulary, bf16, 64 responses.

Padded, and cut from logits with one position more, as `model(...).logits[:, :-1]` is: the layout that Liger asks for.
Where the vocabulary is odd its rows, and those of a fresh gradient, begin at every address, and not at the same ones.
"""

from __future__ import annotations

from ..cases import Case, Problem, Work, build

WORKS = (
    Work("forward", "loss alone", gradient=False),
    Work("gspo", "GSPO, off-policy"),
    Work("gspo_on_policy", "GSPO, on-policy", on_policy=True),
    Work("grpo", "GRPO, a ratio per token, off-policy", objective="grpo"),
    Work("ppo", "PPO, one mean over all tokens, off-policy", objective="ppo"),
    Work("gspo_inactive", "GSPO, 45% of no advantage, 15% of the rest clipped", no_advantage=0.45, clipped=0.15),
)
BY_NAME = {work.name: work for work in WORKS}


def case_of(work: Work, smoke: bool = False) -> Case:
    if smoke:
        return Case(work, "fp32", 100, "padded", sequences=8, spare=1)
    return Case(work, "bf16", 151_936, "padded", sequences=64, spare=1)


def build_on(device: str, work: Work, rows: int) -> Problem:
    return build(case_of(work, smoke=device == "cpu"), rows, device)


def build_one_read(device: str, name: str) -> Problem:
    """Of <work>-<dtype>-<vocabulary>-<rows>."""
    work, dtype, vocab, rows = name.split("-")
    sequences = 8 if device == "cpu" else 64
    return build(Case(BY_NAME[work], dtype, int(vocab), "padded", sequences=sequences, spare=1), int(rows), device)
