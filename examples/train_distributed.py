"""The training of train_arithmetic.py on several ranks, with the learning curve of one process.

    python examples/train_distributed.py                                          # one process: the reference
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --parallel data
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --parallel vocabulary
    python examples/train_distributed.py --compare                                # the three curves in one figure

`data` is FSDP2: each rank samples and learns from its part of the groups. `vocabulary` shards the LM head: each rank
has some rows of it, no rank ever has all logits of the training, and the body is the same on every rank.

No random number depends on the number of ranks. Every rank draws all problems, and for every token of every response a
number from 0 to 1, which selects the token by the inverse of the cumulative distribution; a rank uses the numbers of
its own responses. So curves differ only by rounding, until rounding changes a sampled token or a clip decision; from
that step on the trainings are equally good, but not equal. With `--dtype float64` this happens only after the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # on GPUs replicas stay equal only with deterministic sums

import torch
import torch.distributed as dist
from arithmetic import (
    MAX_RESPONSE,
    Batch,
    Problems,
    Settings,
    build_model,
    build_optimizer,
    build_tokenizer,
    generate,
    grade,
    greedy_accuracy,
    update,
    warm_up,
)
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from tqdm import tqdm
from train_arithmetic import History, draw_plot, parse_arguments, plt, write_record
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from gspo_kernels import (
    global_count,
    group_advantages,
    gspo_loss,
    linear_gspo_loss,
    linear_token_logprobs,
    token_logprobs,
)


class Policy:
    """One process with the whole model and the whole batch: the reference of the others."""

    name = "one process"
    share, shares = 0, 1  # (index of this rank's part of every batch, number of parts)

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model
        self.sampler = copy.deepcopy(model)  # whole on every rank, like an inference engine's

    @torch.no_grad()
    def refresh_sampler(self) -> None:
        for theirs, ours in zip(self.sampler.parameters(), self.model.parameters(), strict=True):
            theirs.copy_(self.gathered(ours))

    def gathered(self, parameter: Tensor) -> Tensor:
        return parameter

    def logprobs(self, batch: Batch) -> Tensor:
        token_ids, mask = batch.targets()
        return token_logprobs(batch.logits(self.model), token_ids, mask=mask).logprobs

    def loss(self, batch: Batch, advantages: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """-> this rank's share of the loss, and the clip fraction over all ranks"""
        token_ids, mask = batch.targets()
        loss, stats = gspo_loss(batch.logits(self.model), token_ids, advantages, old_logprobs, mask=mask)
        return loss, stats.clip_fraction

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clips by the norm of the whole model's gradient, and returns it."""
        return clip_grad_norm_(parameters, max_norm)

    def summed(self, numbers: Tensor) -> Tensor:
        """Summed over the ranks that have parts of a batch."""
        return numbers

    def disagreement(self) -> float:
        """The largest difference between ranks in replicated parameters and their gradients."""
        return 0.0


class DataParallel(Policy):
    """FSDP2: the batch and every parameter are sharded over the ranks."""

    name = "data parallel"

    def __init__(self, model: Qwen3ForCausalLM, mesh: DeviceMesh) -> None:
        super().__init__(model)
        self.mesh, self.share, self.shares = mesh, mesh.get_local_rank(), mesh.size()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def gathered(self, parameter: Tensor) -> Tensor:
        return parameter.full_tensor()

    def loss(self, batch: Batch, advantages: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        token_ids, mask = batch.targets()
        # A mean over this rank's responses would be wrong wherever ranks have different numbers of them. The count of
        # all ranks makes shares of which FSDP's mean is the gradient of the whole mini-batch.
        responses = global_count(mask, group=self.mesh, averaged=True)
        logits = batch.logits(self.model)
        loss, stats = gspo_loss(logits, token_ids, advantages, old_logprobs, mask=mask, normalizer=responses)
        return loss, stats.over(self.mesh).clip_fraction

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return super().clip_gradients(parameters, max_norm).full_tensor()  # a DTensor's norm is that of all its shards

    def summed(self, numbers: Tensor) -> Tensor:
        dist.all_reduce(numbers, group=self.mesh.get_group())
        return numbers


class VocabularyParallel(Policy):
    """The head is sharded over the vocabulary. All ranks have the same batch and the same body.

    The loss gives every rank the gradient of the hidden states from the whole vocabulary. So the gradients of the body
    are equal on all ranks without another collective, and replicas that start equal stay equal.
    """

    name = "vocabulary parallel"

    def __init__(self, model: Qwen3ForCausalLM, mesh: DeviceMesh) -> None:
        super().__init__(model)
        self.mesh = mesh
        rows = model.lm_head.weight.detach().chunk(mesh.size())[mesh.get_local_rank()]
        model.lm_head.weight = nn.Parameter(rows.clone())

    def gathered(self, parameter: Tensor) -> Tensor:
        return self.of_all_ranks(parameter).flatten(0, 1) if parameter is self.model.lm_head.weight else parameter

    def of_all_ranks(self, values: Tensor) -> Tensor:
        """[ranks, ...]"""
        found = [torch.empty_like(values) for _ in range(self.mesh.size())]
        dist.all_gather(found, values.detach(), group=self.mesh.get_group())
        return torch.stack(found)

    def hidden(self, batch: Batch) -> Tensor:
        body = self.model.model
        return body(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).last_hidden_state

    def logprobs(self, batch: Batch) -> Tensor:
        token_ids, mask = batch.targets()
        head = self.model.lm_head.weight
        return linear_token_logprobs(self.hidden(batch), head, token_ids, mask=mask, tp_group=self.mesh).logprobs

    def loss(self, batch: Batch, advantages: Tensor, old_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        token_ids, mask = batch.targets()
        hidden, head = self.hidden(batch), self.model.lm_head.weight
        loss, stats = linear_gspo_loss(hidden, head, token_ids, advantages, old_logprobs, mask=mask, tp_group=self.mesh)
        return loss, stats.clip_fraction

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """The norm is that of the body, which every rank has, and of all ranks' shards of the head."""
        of_body = get_total_norm([parameter.grad for parameter in self.model.model.parameters()])
        of_head = self.of_all_ranks(self.model.lm_head.weight.grad).norm()
        norm = (of_body**2 + of_head**2).sqrt()
        clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def disagreement(self) -> float:
        copies = torch.cat([x.flatten() for p in self.model.model.parameters() for x in (p, p.grad)])
        of_all = self.of_all_ranks(copies)
        return (of_all - of_all[0]).abs().max().item()


def to_float64(model: Qwen3ForCausalLM) -> None:
    """With norms that compute in float64: Qwen3's always round to float32, which would make the curves differ."""
    model.double()
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, Qwen3RMSNorm):
                exact = nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)


@dataclass
class SharedHistory(History):
    responses: list[int] = field(default_factory=list)  # per step a checksum of all responses, in any order
    gradient_norm: list[float] = field(default_factory=list)  # mean over the step's updates, before clipping


def choose_by(numbers: Tensor) -> Callable[[Tensor, int], Tensor]:
    """Samples by numbers [B, MAX_RESPONSE] from 0 to 1, so that a row's tokens do not depend on the other rows.

    A token is the first at which the cumulative distribution exceeds its number.
    """

    def choose(logits: Tensor, position: int) -> Tensor:
        cumulative = logits.double().softmax(-1).cumsum(-1)
        below = cumulative <= numbers[:, position, None]
        return below.sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)  # where the sum is below 1

    return choose


def reinforce(
    policy: Policy,
    tokenizer: PreTrainedTokenizerFast,
    problems: Problems,
    settings: Settings,
    numbers: torch.Generator,
    quiet: bool,
) -> SharedHistory:
    model, sampler = policy.model, policy.sampler
    optimizer = build_optimizer(model)
    history = SharedHistory()
    history.add_evaluation(0, greedy_accuracy(sampler, tokenizer, problems.held_out))
    # This rank has a part of each mini-batch, in whole groups, so that each update equals that of one process.
    responses_per_step = settings.groups * settings.samples
    mine = torch.arange(responses_per_step).view(settings.mini_batches, policy.shares, -1)[:, policy.share].flatten()
    bar = tqdm(range(1, settings.steps + 1), desc=policy.name, unit="step", disable=quiet)
    for step in bar:
        # Roll out: numbers are drawn for all responses, and used for this rank's.
        repeated = [problem for problem in problems.draw(settings.groups) for _ in range(settings.samples)]
        drawn = torch.rand(len(repeated), MAX_RESPONSE, generator=numbers, dtype=torch.float64)[mine]
        width = max(map(len, repeated))  # one token per character; other padding would change positions, and rounding
        repeated = [repeated[i] for i in mine]
        batch, responses = generate(sampler, tokenizer, repeated, choose_by(drawn.to(model.device)), width)
        rewards = grade(repeated, responses).to(model.device)
        advantages = group_advantages(rewards, group_size=settings.samples)
        with torch.no_grad():
            old_logprobs = policy.logprobs(batch)

        # Learn, then copy the new weights to the sampler.
        clip_fractions, norms = [], []
        parts = (whole.chunk(settings.mini_batches) for whole in (batch, advantages, old_logprobs))
        for part, part_advantages, part_old_logprobs in zip(*parts, strict=True):
            loss, clip_fraction = policy.loss(part, part_advantages, part_old_logprobs)
            rate = settings.learning_rate_at(step)
            norms.append(update(model, optimizer, loss, rate, settings.max_grad_norm, policy.clip_gradients))
            clip_fractions.append(clip_fraction)
        policy.refresh_sampler()

        checksum = sum(zlib.crc32(f"{pair}".encode()) for pair in zip(repeated, responses, strict=True))
        found = torch.tensor([rewards.sum(), batch.response_mask.sum(), checksum], dtype=torch.float64)  # whole numbers
        right, tokens, checksum = policy.summed(found.to(model.device)).tolist()
        history.reward.append(right / responses_per_step)
        history.response_length.append(tokens / responses_per_step)
        history.responses.append(int(checksum))
        history.clip_fraction.append(torch.stack(clip_fractions).mean().item())
        history.gradient_norm.append(torch.stack(norms).mean().item())
        if settings.is_evaluated(step):
            history.add_evaluation(step, greedy_accuracy(sampler, tokenizer, problems.held_out))
        bar.set_postfix(history.newest())
    return history


POLICIES = {"single": Policy, "data": DataParallel, "vocabulary": VocabularyParallel}  # names of the files, too
CURVES = {  # history -> (title, label of the axis)
    "reward": ("Reward", "sampled responses\nthat are right"),
    "held_out_accuracy": ("Held-out accuracy", "problems solved\nby greedy decoding"),
    "clip_fraction": ("Clip fraction", "responses\nthat are clipped"),
}


def largest_difference(ours: list[float], theirs: list[float], *, relative: bool = False) -> float:
    return max(abs(x - y) / (abs(x) if relative else 1.0) for x, y in zip(ours, theirs, strict=True))


def draw_comparison(histories: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    styles = {  # thick below thin, so that equal curves are all visible
        "single": {"color": "#BBBBBB", "linewidth": 7},
        "data": {"color": "#0072B2", "linewidth": 2.5},
        "vocabulary": {"color": "#F5A000", "linewidth": 1.2, "linestyle": (0, (4, 4))},
    }
    figure, panels = plt.subplots(3, 1, figsize=(10, 8), sharex=True, layout="constrained")
    for axes, (name, (label, unit)) in zip(panels, CURVES.items(), strict=True):
        for kind, history in histories.items():
            steps = history["held_out_step"] if name == "held_out_accuracy" else range(1, len(history[name]) + 1)
            axes.plot(steps, history[name], label=POLICIES[kind].name, solid_capstyle="butt", **styles[kind])
        axes.set_title(label, loc="left")
        axes.set_ylabel(unit)
        axes.set_ylim(0, None if name == "clip_fraction" else 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(loc="lower right", frameon=False)
    panels[2].set_xlabel("step")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def compare(folder: Path) -> None:
    """Draws the three curves in one figure, and prints their differences."""
    paths = {kind: folder / f"{kind}.json" for kind in POLICIES}
    if missing := [str(path) for path in paths.values() if not path.exists()]:
        raise SystemExit(f"--compare: expected the results of three runs; missing {', '.join(missing)}")
    records = {kind: json.loads(path.read_text()) for kind, path in paths.items()}
    for name in ("seed", "dtype", "settings"):
        if len({json.dumps(record[name]) for record in records.values()}) > 1:
            raise SystemExit(f"--compare: expected three runs of one training; their {name} differ: run them again")
    histories = {kind: record["history"] for kind, record in records.items()}
    reference = histories["single"]
    largest = 0.0
    for kind in ("data", "vocabulary"):
        other = histories[kind]
        print(f"{POLICIES[kind].name}, {records[kind]['ranks']} ranks, against one process:")
        for name, (label, _) in CURVES.items():
            apart = largest_difference(reference[name], other[name])
            largest = max(largest, apart)
            print(f"  {label.lower()}: differs by {apart:.3g} at most")
        apart = largest_difference(reference["gradient_norm"], other["gradient_norm"], relative=True)
        print(f"  gradient norm: differs by {apart:.1e} of itself at most")
        alike = [x == y for x, y in zip(reference["responses"], other["responses"], strict=True)]
        same = [*alike, False].index(False)
        print(f"  sampled responses: all of them the same in the first {same} steps of {len(alike)}")
    title = f"One training three ways, in {records['single']['dtype']}: the largest difference is {largest:.3g}"
    draw_comparison(histories, title, folder / "curves.png")
    print(f"Plot: {folder / 'curves.png'}")


def join_ranks(device: str) -> DeviceMesh:
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (dist.get_world_size(),))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Writes a plot and a JSON file.")
    parser.add_argument("--parallel", choices=("data", "vocabulary"), help="what is sharded over the ranks of torchrun")
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), default="float64", help="after the warm-up (default: %(default)s)"
    )
    parser.add_argument("--compare", action="store_true", help="draw earlier runs in one figure; trains nothing")
    arguments, settings = parse_arguments(parser, Path("runs/distributed"))
    if arguments.compare:
        return compare(arguments.output)
    launched = dist.is_torchelastic_launched()
    ranks = int(os.environ["WORLD_SIZE"]) if launched else 1
    tokenizer = build_tokenizer()
    if launched and arguments.parallel is None:
        parser.error("--parallel: expected data or vocabulary, because torchrun has started ranks")
    if arguments.parallel and not launched:
        parser.error(f"--parallel {arguments.parallel}: expected ranks; start it with torchrun --nproc-per-node 2")
    if launched and arguments.device not in ("cpu", "cuda"):
        parser.error(f"--device {arguments.device}: expected cpu, or cuda, of which each rank takes its own")
    if arguments.parallel == "data" and settings.groups % (settings.mini_batches * ranks):
        parser.error(f"--groups must be a multiple of {settings.mini_batches * ranks}: updates per step, times ranks")
    if arguments.parallel == "vocabulary" and len(tokenizer) % ranks:
        parser.error(f"--parallel vocabulary: {ranks} ranks cannot shard {len(tokenizer)} tokens evenly")

    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(arguments.device != "cpu", warn_only=True)
    mesh = join_ranks(arguments.device) if launched else None
    quiet = mesh is not None and mesh.get_local_rank() != 0

    # Every rank does the whole warm-up from the same seed; only the training after it is parallel.
    torch.manual_seed(arguments.seed)
    problems = Problems(random.Random(arguments.seed), settings.digits, settings.held_out)
    model = build_model(tokenizer, tied=False).to(arguments.device)  # the head has parameters of its own to shard
    warm_up(model, tokenizer, problems, settings, quiet)
    model.zero_grad()
    if arguments.dtype == "float64":
        to_float64(model)
    if mesh is None:
        policy = Policy(model)
    else:
        for parameter in model.parameters():  # on a GPU the ranks' warm-ups may differ by rounding
            dist.broadcast(parameter.data, 0)
        policy = POLICIES[arguments.parallel](model, mesh)
    numbers = torch.Generator().manual_seed(arguments.seed)
    history = reinforce(policy, tokenizer, problems, settings, numbers, quiet)
    disagreement = policy.disagreement()
    if mesh is not None:
        dist.destroy_process_group()
    if quiet:
        return

    seconds = time.perf_counter() - started
    kind = arguments.parallel or "single"
    parameters = sum(parameter.numel() for parameter in policy.sampler.parameters())
    facts = {
        "parallel": kind,
        "ranks": ranks,
        "dtype": arguments.dtype,
        "parameters": parameters,
        "replicas_differ_by": disagreement,
    }
    path = arguments.output / f"{kind}.png"
    write_record(path.with_suffix(".json"), facts, arguments, settings, seconds, history)
    draw_plot(history, f"GSPO, {policy.name}, ranks: {ranks} (seed {arguments.seed})", "responses", path)
    first, last = history.held_out_accuracy[0], history.held_out_accuracy[-1]
    print(f"Held-out accuracy {first:.1%} -> {last:.1%} in {seconds:.0f} s. Plot: {path}, numbers: {path.stem}.json")


if __name__ == "__main__":
    main()
