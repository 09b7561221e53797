"""What top-p, top-k and min-p do to GSPO, without and with kept sets: the tables and the figure of docs/kept-sets.md.

An engine that filters draws each token from a few columns, and reports the token's probability among them. Measured on
the demo's model, for several filters: what GSPO clips before anything was learned; how far the expected gradient of the
loss is from the exact one, by enumeration of all responses; and how a training goes with top-p 0.8.

    python examples/kept_sets.py                    # up to 20 minutes on two CPU cores, into runs/paper
    python examples/kept_sets.py --quick            # seconds
    python examples/kept_sets.py --redraw --output docs  # the page's figure and tables, from docs/kept-sets.json
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "paper"))

import lab
import torch
from arithmetic import (
    QUICK,
    Rollout,
    Settings,
    build_optimizer,
    encode,
    generate,
    grade,
    greedy_accuracy,
    solve,
    update,
)
from lab import GREY, Learner
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from gspo_kernels import KeptTokens, group_advantages, gspo_loss, token_logprobs

SETTINGS = Settings(steps=60)
SMOKE = replace(QUICK, warmup_steps=2, steps=1, samples=4, max_response=4, held_out=4, evaluations=1)
LENGTH = 3  # tokens of an enumerated response: two digits and the end
ENUMERATED = [f"{x}+{y}=" for x in range(1, 10) for y in range(x, 10) if x + y >= 10]  # problems that have one


@dataclass(frozen=True)
class Filter:
    """A filter of an engine, as vLLM applies it; the others are off."""

    name: str
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def keeps(self, logits: Tensor) -> Tensor:
        """bool, in the shape of the logits: the columns that a token may be drawn from."""
        probabilities = logits.softmax(-1)
        keep = probabilities >= self.min_p * probabilities.amax(-1, keepdim=True)
        ordered, order = probabilities.sort(-1, descending=True)
        kept = torch.ones_like(keep)  # in this order
        if self.top_k:
            kept[..., self.top_k :] = False
        if self.top_p < 1:
            kept &= ordered.cumsum(-1) - ordered < self.top_p  # the probability of all larger ones
        return keep & torch.zeros_like(kept).scatter(-1, order, kept)


FILTERS = (
    Filter("no filter"),
    *(Filter(f"top-p {p:g}", top_p=p) for p in (0.95, 0.9, 0.8, 0.7)),
    *(Filter(f"top-k {k}", top_k=k) for k in (4, 2)),
    *(Filter(f"min-p {p:g}", min_p=p) for p in (0.02, 0.1, 0.3)),
)
TRAINED = Filter("top-p 0.8", top_p=0.8)

# What the loss is given: log-probabilities of whom as `old_logprobs`, and whether the kept sets.
WAYS = {
    "kept": "the engine's, with `kept=`",
    "engine": "the engine's",
    "recomputed": "recomputed by the trainer",
}
TRAININGS = {
    "kept": (TRAINED, "kept", f"{TRAINED.name}, {WAYS['kept']}"),
    "engine": (TRAINED, "engine", f"{TRAINED.name}, {WAYS['engine']}"),
    "recomputed": (TRAINED, "recomputed", f"{TRAINED.name}, {WAYS['recomputed']}"),
    "unfiltered": (FILTERS[0], "engine", f"no filter, {WAYS['engine']}"),
}
COLORS = dict(zip(TRAININGS, ("#0072B2", "#D55E00", "#CC79A7", GREY), strict=True))


# --- an engine that filters -------------------------------------------------------------------------------------------


def among(logits: Tensor, keep: Tensor) -> Tensor:
    """Log-probabilities of the distribution over the kept columns; minus infinity elsewhere."""
    return logits.masked_fill(~keep, -torch.inf).log_softmax(-1)


class Engine:
    """Draws from what a filter keeps, and remembers the kept columns and the log-probabilities of what it drew."""

    def __init__(self, chosen: Filter) -> None:
        self.filter = chosen
        self.keep: list[Tensor] = []  # one [B, V] per position
        self.logprobs: list[Tensor] = []  # one [B] per position

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        keep = self.filter.keeps(logits)
        logprobs = among(logits, keep)
        drawn = torch.multinomial(logprobs.exp(), 1)
        self.keep.append(keep)
        self.logprobs.append(logprobs.gather(-1, drawn)[:, 0])
        return drawn


def roll_out(learner: Learner, chosen: Filter, settings: Settings) -> tuple[Rollout, KeptTokens]:
    """`samples` responses to each of `groups` new problems, with the engine's log-probabilities and kept sets."""
    problems = [each for each in learner.problems.draw(settings.groups) for _ in range(settings.samples)]
    engine = Engine(chosen)
    batch, responses = generate(learner.model, learner.tokenizer, problems, engine, max_response=settings.max_response)
    rewards = grade(problems, responses).to(batch.input_ids.device)
    _, mask = batch.targets()
    keep = mask.new_zeros(*mask.shape, learner.model.config.vocab_size, dtype=torch.bool)
    old_logprobs = torch.zeros_like(mask, dtype=torch.float32)
    first = mask.shape[1] - len(engine.keep) - 1  # this row predicts the first token of a response
    keep[:, first:-1] = torch.stack(engine.keep, 1)
    old_logprobs[:, first:-1] = torch.stack(engine.logprobs, 1)
    keep &= mask.bool()[..., None]
    advantages = group_advantages(rewards, group_size=settings.samples)
    return Rollout(batch, rewards, advantages, old_logprobs), KeptTokens.from_mask(keep)


def mini_batches(rollout: Rollout, kept: KeptTokens, count: int) -> Iterator[tuple[Rollout, KeptTokens]]:
    """The kept sets have one row per token, a sequence after the other."""
    first = 0
    for part in rollout.chunk(count):
        last = first + part.old_logprobs.numel()
        yield part, kept[first:last]
        first = last


# --- before anything was learned --------------------------------------------------------------------------------------


@torch.no_grad()
def clipping(learner: Learner, chosen: Filter, settings: Settings) -> dict[str, Any]:
    """What GSPO makes of responses of the very policy that is trained: every ratio should be 1."""
    rollout, kept = roll_out(learner, chosen, replace(settings, groups=2 * settings.groups))
    token_ids, mask = rollout.batch.targets()
    logits = rollout.batch.logits(learner.model)
    both = token_logprobs(logits, token_ids, mask=mask, kept=kept)
    assert both.full is not None
    counts = kept.counts.reshape(mask.shape)
    counts = counts.where(counts > 0, logits.shape[-1])[mask.bool()]  # a row without entries keeps all
    found: dict[str, Any] = {
        "columns": counts.float().mean().item(),
        "singletons": (counts == 1).float().mean().item(),
        "mass": (both.full.logprobs - both.kept.logprobs).exp()[mask.bool()].mean().item(),
    }
    penalized = rollout.advantages < 0
    for way, logprobs, sets in (("kept", both.kept.logprobs, kept), ("engine", both.full.logprobs, None)):
        stats = gspo_loss(logits, token_ids, rollout.advantages, rollout.old_logprobs, mask=mask, kept=sets).stats
        log_ratio = ((logprobs - rollout.old_logprobs) * mask).sum(1) / mask.sum(1)
        off = log_ratio.expm1().abs()
        found[way] = {
            "clipped": stats.clip_fraction.item(),
            "penalized": (stats.clip_fraction * len(off) / penalized.sum().clamp(min=1)).item(),
            "mean": off.mean().item(),
            "largest": off.max().item(),
        }
    return found


# --- the exact gradient -----------------------------------------------------------------------------------------------


@dataclass
class Enumerated:
    """All responses of `LENGTH` tokens that a filter leaves to some problems."""

    logits: Tensor  # [R, LENGTH, V], differentiable
    token_ids: Tensor  # [R, LENGTH]
    keep: Tensor  # [R, LENGTH, V]
    problem: Tensor  # [R]: which problem a response answers
    rewards: Tensor  # [R]


def enumerated(learner: Learner, problems: list[str], chosen: Filter) -> Enumerated:
    """A tree of prefixes that grows by what the filter keeps; one forward pass gives the logits of all responses."""
    device = learner.model.device
    prompt = encode(learner.tokenizer, problems, "left", device).input_ids  # of equal length
    texts = [solve(problem) + learner.tokenizer.eos_token for problem in problems]
    right = encode(learner.tokenizer, texts, "right", device).input_ids  # [P, LENGTH]
    problem = torch.arange(len(problems), device=device)
    prefix, keep = prompt, torch.zeros(len(problems), 0, learner.model.config.vocab_size, dtype=torch.bool)
    for position in range(LENGTH):
        with torch.no_grad():
            here = chosen.keeps(learner.model(prefix).logits[:, -1])
        keep = torch.cat([keep, here[:, None]], 1)
        if position == LENGTH - 1:
            logits = learner.model(prefix).logits[:, prompt.shape[1] - 1 :]  # [prefixes, LENGTH, V]
        row, token = here.nonzero(as_tuple=True)
        prefix, keep, problem = torch.cat([prefix[row], token[:, None]], 1), keep[row], problem[row]
    token_ids = prefix[:, prompt.shape[1] :]
    rewards = (token_ids == right[problem]).all(1).float()
    return Enumerated(logits[row], token_ids, keep, problem, rewards)


def gradients(learner: Learner, problems: list[str], chosen: Filter) -> dict[str, Tensor]:
    """Of the expected reward, "exact"; and what the expectation of each loss's gradient makes of it, by way.

    All responses have the same length, so that GSPO's mean over tokens is a constant factor, which is taken out.
    """
    all_of = enumerated(learner, problems, chosen)
    picked = all_of.token_ids[..., None]
    among_kept = among(all_of.logits.double(), all_of.keep).gather(-1, picked)[..., 0]
    probability = among_kept.sum(1).exp()  # [R]; those of one problem add up to 1
    expected = probability.new_zeros(len(problems)).index_add(0, all_of.problem, probability * all_of.rewards)
    parameters = list(learner.model.parameters())

    def flat(value: Tensor) -> Tensor:
        return torch.cat([x.reshape(-1) for x in torch.autograd.grad(value, parameters, retain_graph=True)]).double()

    found = {"exact": flat(expected.mean())}
    probability, expected = probability.detach().float(), expected.detach().float()
    recomputed = token_logprobs(all_of.logits.detach(), all_of.token_ids).logprobs
    kept = KeptTokens.from_mask(all_of.keep)
    for way in WAYS:
        loss = gspo_loss(
            all_of.logits,
            all_of.token_ids,
            all_of.rewards - expected[all_of.problem],
            recomputed if way == "recomputed" else among_kept.detach().float(),
            importance_weights=probability,
            normalizer=float(len(problems)),
            kept=kept if way == "kept" else None,
        ).loss
        found[way] = -LENGTH * flat(loss)
    return found


def apart(found: Tensor, exact: Tensor) -> dict[str, float]:
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
    return {"error": ((found - exact).norm() / exact.norm()).item(), "cosine": cosine.item()}


def bias(
    learner: Learner, filters: tuple[Filter, ...], problems: list[str] = ENUMERATED
) -> dict[str, dict[str, dict[str, float]]]:
    """By filter and way: the distance of the expected gradient from the exact one."""
    found = {}
    for chosen in filters:
        exact = gradients(learner, problems, chosen)
        found[chosen.name] = {way: apart(exact[way], exact["exact"]) for way in WAYS}
        lab.tick()
    return found


# --- a training -------------------------------------------------------------------------------------------------------


def train(learner: Learner, chosen: Filter, way: str, settings: Settings) -> dict[str, list[float]]:
    torch.manual_seed(0)
    optimizer = build_optimizer(learner.model)
    history: dict[str, list[float]] = {"reward": [], "first": [], "clipped": [], "mass": [], "accuracy": []}
    history["accuracy"].append(greedy_accuracy(learner.model, learner.tokenizer, learner.problems.held_out))
    for step in range(1, settings.steps + 1):
        rollout, kept = roll_out(learner, chosen, settings)
        token_ids, mask = rollout.batch.targets()
        with torch.no_grad():
            own = token_logprobs(rollout.batch.logits(learner.model), token_ids, mask=mask).logprobs
        mass = (own - rollout.old_logprobs)[mask.bool()].exp().mean()
        if way == "recomputed":
            rollout.old_logprobs = own
        clipped = []
        for part, sets in mini_batches(rollout, kept, settings.mini_batches):
            token_ids, mask = part.batch.targets()
            loss, stats = gspo_loss(
                part.batch.logits(learner.model),
                token_ids,
                part.advantages,
                part.old_logprobs,
                mask=mask,
                kept=sets if way == "kept" else None,
            )
            update(learner.model, optimizer, loss, settings.learning_rate_at(step), settings.max_grad_norm)
            clipped.append(stats.clip_fraction)
        history["reward"].append(rollout.rewards.mean().item())
        history["first"].append(clipped[0].item())  # before the policy has moved
        history["clipped"].append(torch.stack(clipped).mean().item())
        history["mass"].append(mass.item())
        if settings.is_evaluated(step):
            history["accuracy"].append(greedy_accuracy(learner.model, learner.tokenizer, learner.problems.held_out))
        lab.tick()
    return history


# --- runs, tables, figure ---------------------------------------------------------------------------------------------


def measure(seed: int, settings: Settings, filters: tuple[Filter, ...], device: str) -> dict[str, Any]:
    learner = lab.warmed_up(seed, settings, device)
    torch.manual_seed(seed)
    found = {"bias": bias(learner, filters[1:]), "clipping": {}, "training": {}}
    for chosen in filters:
        found["clipping"][chosen.name] = clipping(learner.copy(), chosen, settings)
        lab.tick()
    for name, (chosen, way, _) in TRAININGS.items():
        found["training"][name] = train(learner.copy(), chosen, way, settings)
    return found


def run(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    began = time.perf_counter()
    filters = (FILTERS[0], TRAINED) if arguments.quick else FILTERS
    jobs = [(seed, settings, filters, arguments.device) for seed in range(arguments.seeds)]
    total = arguments.seeds * (2 * len(filters) - 1 + len(TRAININGS) * settings.steps)
    found = lab.side_by_side(measure, jobs, total, arguments.workers, arguments.name)
    return lab.save(arguments, settings, began, joined(found))


def joined(found: list[Any]) -> Any:
    """One record of several: each number becomes the list of all seeds' numbers."""
    if not isinstance(found[0], dict):
        return found
    return {name: joined([each[name] for each in found]) for name in found[0]}


def tables(record: dict[str, Any]) -> dict[str, str]:
    return {"clipping": clipping_table(record), "bias": bias_table(record), "training": training_table(record)}


def clipping_table(record: dict[str, Any]) -> str:
    titles = ["filter", "columns", "one column", "p(S)", "clipped", "of the penalized", "ratio off 1, mean", "largest"]
    titles += ["with `kept=`: clipped", "ratio off 1, largest"]
    rows = []
    for name, found in record["clipping"].items():
        engine, kept = found["engine"], found["kept"]
        shares = [share(each) for each in (found["singletons"], found["mass"], engine["clipped"], engine["penalized"])]
        off = [size(lab.mean(engine["mean"])), size(max(engine["largest"]))]
        own = [share(kept["clipped"]), size(max(kept["largest"]))]
        rows.append([name, f"{lab.mean(found['columns']):.1f}", *shares, *off, *own])
    return lab.table(titles, rows)


def share(values: list[float]) -> str:
    return f"{lab.mean(values):.0%}" if any(values) else "0"


def size(value: float) -> str:
    return f"{value:.0e}" if value < 1e-3 else f"{value:.2g}"


def bias_table(record: dict[str, Any]) -> str:
    titles = ["filter", *(title for text in WAYS.values() for title in (f"{text}: error", "cosine"))]
    rows = []
    for name, found in record["bias"].items():
        pairs = [(lab.mean(found[way]["error"]), lab.mean(found[way]["cosine"])) for way in WAYS]
        cells = [(f"{x:.0e}" if x < 1e-3 else f"{x:.1%}", f"{y:.3f}") for x, y in pairs]
        rows.append([name, *itertools.chain(*cells)])
    return lab.table(titles, rows)


def training_table(record: dict[str, Any]) -> str:
    titles = ["filter, `old_logprobs`", "mean reward", "of the last tenth", "held-out accuracy"]
    titles += ["clipped, first updates", "all updates", "p(S), last tenth"]
    rows = []
    for name, found in record["training"].items():
        reward, first, clipped = ([lab.mean(each) for each in found[key]] for key in ("reward", "first", "clipped"))
        late, mass = ([lab.mean(tail(each)) for each in found[key]] for key in ("reward", "mass"))
        accuracy = [each[-1] for each in found["accuracy"]]
        cells = (lab.ranged(each, ".0%") for each in (reward, late, accuracy, first, clipped, mass))
        rows.append([TRAININGS[name][2], *cells])
    return lab.table(titles, rows)


def tail(values: list[float]) -> list[float]:
    """The last tenth, at least one."""
    return values[-max(1, len(values) // 10) :]


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    figure, (reward, clipped, accuracy) = lab.panels(3, f"GSPO with {TRAINED.name}, without and with kept sets")
    for name, found in record["training"].items():
        for axes, key in ((reward, "reward"), (clipped, "first")):
            runs = [lab.smooth(each, 5) for each in found[key]]
            lab.spread(axes, range(1, len(runs[0]) + 1), runs, COLORS[name], TRAININGS[name][2].replace("`", ""))
        last = len(found["accuracy"][0]) - 1
        steps = [i * len(found["reward"][0]) / last for i in range(last + 1)]
        lab.spread(accuracy, steps, found["accuracy"], COLORS[name], name, marker="o", ms=3)
    reward.set(title="Reward", ylabel="sampled responses that are right")
    clipped.set(title="Clipped by the first of a step's updates", ylabel="responses that are clipped")
    accuracy.set(title="Held-out accuracy", ylabel="problems solved, greedy decoding")
    for axes in (reward, clipped, accuracy):
        axes.set_xlabel("step")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    reward.legend(frameon=False, fontsize=7, title="filter, old log-probabilities", title_fontsize=7)
    lab.write(figure, arguments)


def fill(page: str, record: dict[str, Any]) -> str:
    return lab.fill(page, "kept sets", tables(record))


def main() -> None:
    arguments, settings = lab.parse(__doc__, "kept-sets", 2, SETTINGS, SMOKE)
    record = lab.load(arguments) if arguments.redraw else run(arguments, settings)
    draw(record, arguments)
    page = arguments.output / "kept-sets.md"
    if page.exists():
        page.write_text(fill(page.read_text(), record))
        print(f"page: {page}")
    print("", *tables(record).values(), sep="\n\n")


if __name__ == "__main__":
    main()
