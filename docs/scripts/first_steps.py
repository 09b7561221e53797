"""The first ten optimizer steps of each trainer's page, by a tiny model on a CPU. It needs the environment of
`make test-trainers` and takes a minute:

    .venv-trainers/bin/python docs/scripts/first_steps.py [trainer ...]

The task and the model are those of the demo: sums of two numbers, and a Qwen3 of 0.1 million parameters after a short
supervised warm-up. A rollout of 256 responses, 8 to a problem, makes four mini-batches of one optimizer step each. A
trainer's driver, drivers/<trainer>.py, builds that trainer's own arguments, calls the loss as the trainer does and
returns the metrics under the names that the trainer logs. The results go to docs/first-steps.json and, as a table, into
docs/<trainer>.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import platform
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCS = Path(__file__).parents[1]
sys.path += [str(DOCS.parent / "examples"), str(DOCS / "scripts")]

import arithmetic  # noqa: E402
from arithmetic import QUICK, Problems, Rollout, build_model, build_optimizer, build_tokenizer, roll_out  # noqa: E402

from gspo_kernels import token_logprobs  # noqa: E402

RESULTS = DOCS / "first-steps.json"
BEGIN, END = "<!-- first steps: begin, by docs/scripts/first_steps.py -->", "<!-- first steps: end -->"
STEPS, MINI_BATCHES = 10, 4
SETTINGS = arithmetic.replace(QUICK, warmup_steps=200, groups=32, samples=8, digits=2, learning_rate=1e-4)


@dataclass(frozen=True)
class Batch:
    """A mini-batch as trainers have it: responses alone, padded on the right."""

    logprobs: Tensor  # [B, T] float32, differentiable
    old_logprobs: Tensor  # [B, T]
    entropy: Tensor  # [B, T], differentiable
    advantages: Tensor  # [B]
    mask: Tensor  # [B, T] bool
    logits: Tensor  # [B, T, V], what `logprobs` come from
    token_ids: Tensor  # [B, T]
    hidden: Tensor  # [B, T, D], what `logits` come from
    weight: Tensor  # [V, D], the LM head's
    group_size: int = 8  # responses to a prompt, one after the other

    @property
    def global_tokens(self) -> int:
        """Of the optimizer step: one rank and one micro-batch."""
        return int(self.mask.sum())

    @property
    def global_responses(self) -> int:
        return len(self.mask)


def mini_batch(model: Any, rollout: Rollout) -> Batch:
    """With the tensors of the current model."""
    ids, attention = rollout.batch.input_ids, rollout.batch.attention_mask
    token_ids, mask = rollout.batch.targets()
    first = int(mask.any(0).nonzero()[0])  # responses start in one column

    def responses(x: Tensor) -> Tensor:
        return x[:, first:-1]

    hidden = responses(model.model(ids, attention_mask=attention, use_cache=False).last_hidden_state)
    logits, weight = model.lm_head(hidden), model.lm_head.weight
    token_ids, mask = responses(token_ids), responses(mask).bool()
    found = token_logprobs(logits, token_ids, mask=mask)
    return Batch(
        found.logprobs, responses(rollout.old_logprobs), found.entropy, rollout.advantages, mask, logits, token_ids,
        hidden, weight,
    )  # fmt: skip


def warmed_up(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    arithmetic.warm_up(model, tokenizer, Problems(random.Random(seed), SETTINGS.digits, 0), SETTINGS, quiet=True)
    return model


def first_steps(model: Any, tokenizer: Any, driver: Any) -> list[dict[str, float]]:
    """The metrics of each step, and the mean reward and the gradient's norm, which every trainer logs."""
    torch.manual_seed(1)
    model, problems = copy.deepcopy(model), Problems(random.Random(1), SETTINGS.digits, 0)
    optimizer, found = build_optimizer(model), []
    while len(found) < STEPS:
        rollout = roll_out(model, tokenizer, problems, SETTINGS)
        for part in list(rollout.chunk(MINI_BATCHES))[: STEPS - len(found)]:
            loss, metrics = driver.step(mini_batch(model, part))
            norm = arithmetic.update(model, optimizer, loss, SETTINGS.learning_rate, SETTINGS.max_grad_norm)
            found.append({"reward": rollout.rewards.mean().item(), "grad_norm": norm.item(), **metrics})
    return found


def history(model: Any, tokenizer: Any, driver: Any) -> list[dict[str, float]]:
    """The same by a trainer that samples and updates by itself."""
    torch.manual_seed(1)
    problems = Problems(random.Random(1), SETTINGS.digits, 0).draw(SETTINGS.groups * -(-STEPS // MINI_BATCHES))
    responses = SETTINGS.groups * SETTINGS.samples // MINI_BATCHES
    return driver.history(
        copy.deepcopy(model), tokenizer, problems, arithmetic.grade, max_steps=STEPS, seed=1,
        per_device_train_batch_size=responses, steps_per_generation=MINI_BATCHES, num_generations=SETTINGS.samples,
        learning_rate=SETTINGS.learning_rate, max_grad_norm=SETTINGS.max_grad_norm, adam_beta2=0.99,
    )  # fmt: skip


def table(steps: list[dict[str, float]]) -> str:
    """One row a step. Metrics that never change are left out, and rounding errors are 0."""
    shown = [{name: f"{value:.3g}" if abs(value) >= 1e-6 else "0" for name, value in step.items()} for step in steps]
    names = [name for name in shown[0] if len({step[name] for step in shown}) > 1]
    rows = ["| step | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    rows += [f"| {i} | " + " | ".join(step[name] for name in names) + " |" for i, step in enumerate(shown, 1)]
    return "\n".join(rows)


def page_of(trainer: str) -> Path:
    return DOCS / f"{trainer.replace('_', '-')}.md"


def with_table(text: str, steps: list[dict[str, float]]) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table(steps)}\n\n{END}{rest.split(END)[1]}"


def write(trainer: str, state: str) -> None:
    """From the weights after the warm-up."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    model.load_state_dict(torch.load(state))
    driver = importlib.import_module(f"drivers.{trainer}")
    run = history if hasattr(driver, "history") else first_steps
    steps = run(model, tokenizer, driver)
    shown = getattr(driver, "SHOWN", tuple(steps[0]))  # of a trainer that logs more than a page can show
    steps = [{name: step[name] for name in ("reward", "grad_norm", *shown)} for step in steps]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[trainer] = {
        "version": driver.VERSION, "machine": platform.machine(), "python": platform.python_version(),
        "torch": torch.__version__, "transformers": version("transformers"), "steps": steps,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    page_of(trainer).write_text(with_table(page_of(trainer).read_text(), steps))
    print(f"{trainer}\n{table(steps)}\n")


def main() -> None:
    drivers = sorted(path.stem for path in (DOCS / "scripts" / "drivers").glob("[a-z]*.py"))
    parser = argparse.ArgumentParser()
    parser.add_argument("trainers", nargs="*", metavar="trainer", help=f"of {', '.join(drivers)}; none: all")
    parser.add_argument("--state", help="the weights after the warm-up, of a file; for one trainer")
    arguments = parser.parse_args()
    chosen = arguments.trainers or drivers
    if unknown := set(chosen) - set(drivers):
        parser.error(f"expected drivers of docs/scripts/drivers; got {', '.join(sorted(unknown))}")
    if arguments.state:
        write(chosen[0], arguments.state)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = f"{folder}/state.pt"
        torch.save(warmed_up().state_dict(), state)
        for trainer in chosen:  # in processes of their own: some trainers patch the libraries of others
            subprocess.run([sys.executable, __file__, trainer, "--state", state], check=True)


if __name__ == "__main__":
    main()
