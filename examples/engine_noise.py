"""How an engine's log-probabilities differ from the trainer's, by response length: docs/engine-noise.md.

vLLM samples with the weights of the demo's model, in float32 and in bfloat16, and the trainer computes the same
log-probabilities. Nothing was learned in between, so GSPO's ratios should be 1. Measured: the error of a token, that of
the mean over a response, and the share of the responses that GSPO clips for it. A response is up to 1,600 tokens long;
shorter ones are its beginnings.
With `linear_logits` the engine samples from logits that this package computes from its hidden states, in float32.

    python examples/engine_noise.py  # half an hour on two CPU cores, into runs/paper; needs vLLM
    python examples/engine_noise.py --quick            # smoke test
    python examples/engine_noise.py --redraw --output docs  # figure and tables, from docs/engine-noise.json
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

sys.path.append(str(Path(__file__).parent / "paper"))

import lab
import torch
from arithmetic import Problems, build_tokenizer, count, greedy_accuracy
from engine import vllm_version
from engine_noise_runs import (
    ENGINES,
    TRAINERS,
    Sizes,
    packed_logprobs,
    random_model,
    repeated,
    sample,
    trained_model,
    trainer_logprobs,
    trainer_model,
)
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from tqdm import tqdm

from gspo_kernels import GSPO, rollout_mismatch

LENGTHS = (10, 30, 100, 300, 1000, 1600)  # of the tables
LIMIT = 0.05  # of the responses may be clipped before learning
LOWEST, HIGHEST = math.log1p(-GSPO.eps_low), math.log1p(GSPO.eps_high)  # of a log-ratio that is not clipped


SMOKE = Sizes(warmup_steps=2, stream_steps=(1, 1), responses=4, length=40, short=(4, 20), again=2)
MODELS = {"trained": "the demo's model", "random": "random weights"}
JOBS = [("trained", engine) for engine in ENGINES] + [("random", "bf16"), ("random", "bf16, linear_logits")]
QUICK_JOBS = [("trained", "bf16"), ("trained", "bf16, linear_logits")]
PAIRS = [("trained", "fp32", trainer) for trainer in ("fp32", "fp32, bf16 weights", "bf16")]  # of the table
PAIRS += [("trained", "bf16", trainer) for trainer in TRAINERS]
PAIRS += [("trained", engine, "bf16, linear") for engine in ("bf16, fp32 head", "bf16, linear_logits")]
PAIRS += [("random", "bf16", "fp32"), ("random", "bf16", "bf16"), ("random", "bf16, linear_logits", "bf16, linear")]
FLOORS = {
    ("bf16", "engine, prefill"): "engine bf16: decoding, and reading the response at once",
    ("bf16", "bf16, one by one"): "trainer bf16, bf16 logits: in a batch, one by one",
    ("bf16", "bf16, packed"): "trainer bf16, bf16 logits: padded, packed",
    ("bf16", "bf16, linear, one by one"): "trainer bf16, `linear_token_logprobs`: in a batch, one by one",
    ("bf16", "bf16, linear, packed"): "trainer bf16, `linear_token_logprobs`: padded, packed",
}
LINES = {  # of the figure: engine, trainer
    ("bf16", "fp32"): (lab.GREY, "-"),
    ("bf16", "bf16"): ("#D55E00", "-"),
    ("bf16, linear_logits", "bf16, linear"): ("#0072B2", "-"),
    ("fp32", "fp32"): (lab.GREEN, "-"),
}
RULE = (0.001, 0.003, 0.005, 0.01, 0.015, 0.02, 0.025)  # nats


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def clipped_share(length: float, spread: float, bias: float) -> float:
    """Share of the responses that GSPO clips if log-ratios are normal, of mean `bias` and deviation spread / sqrt(n).

    Half of the advantages are positive, and clipped above 1 + eps_high; half are negative, clipped below 1 - eps_low.
    """
    normal = NormalDist(bias, max(spread / math.sqrt(length), 1e-12))
    return 0.5 * (1 - normal.cdf(HIGHEST)) + 0.5 * normal.cdf(LOWEST)


def length_below(limit: float, spread: float, bias: float) -> float | None:
    """The length from which the share is below the limit; None: there is none, because the mean itself is outside."""
    if not LOWEST < bias < HIGHEST:
        return None
    low, high = 0.0, 100.0  # of the length's logarithm; a mean within the range leaves a share that only falls
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if clipped_share(math.exp(middle), spread, bias) < limit else (middle, high)
    return math.exp(high)


def expected_length(noise: float) -> float | None:
    """For independent errors of `noise` nats a token. Their mean is -noise^2 / 2: minus the KL divergence."""
    return length_below(LIMIT, noise, -(noise**2) / 2)


def curve_lengths(longest: int) -> list[int]:
    """Lengths from 10 on, 16 to a factor of 10, and all of the tables."""
    steps = round(16 * math.log10(max(longest, 10) / 10))
    spaced = {round(10 * (longest / 10) ** (i / steps)) for i in range(steps + 1)} if steps else {10}
    return sorted(spaced | {n for n in LENGTHS if n <= longest})


def by_length(errors: Tensor, lengths: Sequence[int]) -> dict[str, list[float]]:
    """Of the means of the first n errors of each response: errors [R, T], trainer minus engine."""
    means = errors.cumsum(1)[:, [n - 1 for n in lengths]] / torch.tensor(lengths)
    above, below = (means > HIGHEST).double().mean(0), (means < LOWEST).double().mean(0)
    return {
        "rms": means.square().mean(0).sqrt().tolist(),
        "deviation": means.std(0, correction=0).tolist(),
        "outside": (above + below).tolist(),
        "clipped": ((above + below) / 2).tolist(),  # half of the advantages are of either sign
    }


def slope_of(errors: Tensor, lengths: Sequence[int]) -> float:
    """Of the deviation of means over n successive errors, by n, both logarithmic: -0.5 if errors are independent.

    Least squares over lengths of which a response has at least four pieces. 0 if there are no errors.
    """
    points = []
    for n in lengths:
        pieces = errors[:, : errors.shape[1] // n * n].reshape(-1, n).mean(1)
        if 4 * n <= errors.shape[1] and pieces.std(correction=0) > 0:
            points.append((math.log(n), pieces.std(correction=0).log().item()))
    if len(points) < 2:
        return 0.0
    u, v = torch.tensor(points).double().T
    return (((u - u.mean()) * (v - v.mean())).sum() / (u - u.mean()).square().sum()).item()


def spread_of(lengths: Sequence[int], deviation: Sequence[float]) -> float:
    """sqrt(n) times the deviation of means over n errors, from the longer half of the lengths measured."""
    late = [n * deviation[i] ** 2 for i, n in enumerate(lengths) if 2 * n >= lengths[-1]]
    return math.sqrt(lab.mean(late))


def measured_length(lengths: Sequence[int], clipped: Sequence[float]) -> int | None:
    """The first length from which all shares are below the limit."""
    below = None
    for length, share in zip(reversed(lengths), reversed(clipped), strict=True):
        if share >= LIMIT:
            break
        below = length
    return below


def compare(trainer: Tensor, engine: Tensor) -> dict[str, Any]:
    """What the errors of responses are, [R, T] each, and what they do to GSPO."""
    errors = trainer.double() - engine.double()
    lengths = curve_lengths(errors.shape[1])
    found: dict[str, Any] = {"lengths": lengths, **by_length(errors, lengths)}
    spread = spread_of(lengths, found["deviation"])
    signs = torch.tensor([1.0, -1.0]).repeat(len(errors))[: len(errors)]
    mismatch = rollout_mismatch(trainer.float(), engine.float(), signs).as_dict()
    wanted = ("kl_k1", "kl_k3", "noise", "clip_fraction", "flip_fraction", "sequence_effective_fraction")
    # The engine drew the tokens, so that the mean error is -KL; k3 estimates it with less variance than the mean does.
    bias = -float(mismatch["kl_k3"])
    return found | {
        "responses": len(errors),
        "entropy": -engine.mean().item(),  # estimated by the tokens that were drawn
        "noise": errors.square().mean().sqrt().item(),
        "largest": errors.abs().max().item(),
        "mean": errors.mean().item(),
        "bias": bias,
        "spread": spread,
        "slope": slope_of(errors, lengths),
        "measured_length": measured_length(lengths, found["clipped"]),
        "fitted_length": length_below(LIMIT, spread, bias),
        "mismatch": {name: float(mismatch[name]) for name in wanted},
    }


# --- runs, tables, figure ---------------------------------------------------------------------------------------------


def measured(folder: Path, sampled: dict[str, Tensor], prompts: list[list[int]], engine: str, sizes: Sizes) -> Any:
    """All comparisons with one engine's responses, by trainer."""
    ids, logprobs = sampled["ids"], sampled["logprobs"]
    found: dict[str, Any] = {"pairs": {}}
    for trainer in TRAINERS:
        model = trainer_model(folder, trainer)
        whole = trainer_logprobs(model, trainer, prompts, ids)
        found["pairs"][trainer] = compare(whole, logprobs)
        if "short_ids" in sampled:
            few = trainer_logprobs(model, trainer, repeated(prompts, sizes.short[0]), sampled["short_ids"], rows=64)
            found["pairs"][trainer]["short"] = by_length(few - sampled["short_logprobs"], [sizes.short[1]])
    if "prefill" in sampled:
        again = len(sampled["prefill"])
        found["floors"] = {"engine, prefill": compare(sampled["prefill"], logprobs[:again])}
        for trainer in ("bf16", "bf16, linear"):
            model = trainer_model(folder, trainer)
            whole = trainer_logprobs(model, trainer, prompts[:again], ids[:again])
            alone = trainer_logprobs(model, trainer, prompts[:again], ids[:again], rows=1)
            packed = packed_logprobs(model, trainer, prompts[:again], ids[:again])
            found["floors"] |= {f"{trainer}, one by one": compare(alone, whole)}
            found["floors"] |= {f"{trainer}, packed": compare(packed, whole)}
    if "own" in sampled:
        found["own"] = sampled["own"].item()
    return found


def run(arguments: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    began = time.perf_counter()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the engines' processes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer, problems = build_tokenizer(), Problems(random.Random(0), 3, 500)
    content: dict[str, Any] = {model: {} for model in MODELS}
    with tempfile.TemporaryDirectory() as root:
        for name, model in (("trained", trained_model(sizes, problems, tokenizer)), ("random", random_model())):
            model.save_pretrained(folder := Path(root, name))
            tokenizer.save_pretrained(folder)
            if name == "trained":
                content["accuracy"] = greedy_accuracy(model, tokenizer, problems.held_out)
                print(f"held-out accuracy: {content['accuracy']:.0%}")
        prompts = [tokenizer(each).input_ids for each in Problems(random.Random(1), 3, 0).draw(sizes.responses)]
        chosen = QUICK_JOBS if arguments.quick else JOBS
        jobs = [(Path(root, model), engine, prompts, sizes) for model, engine in chosen]
        # A fresh process for each engine, because vLLM reads the environment and the device once.
        with multiprocessing.get_context("spawn").Pool(arguments.workers, maxtasksperchild=1) as pool:
            results = pool.imap(work, jobs, chunksize=1)
            for (model, engine), found in zip(chosen, tqdm(results, arguments.name, len(jobs)), strict=True):
                content[model][engine] = found
    content["rule"] = [{"noise": noise, "length": expected_length(noise)} for noise in RULE]
    content["vllm"] = vllm_version()
    return lab.save(arguments, sizes, began, content)


def work(job: tuple[Path, str, list[list[int]], Sizes]) -> dict[str, Any]:
    folder, engine, prompts, sizes = job
    found: dict[str, Any] = measured(folder, sample(folder, engine, prompts, sizes), prompts, engine, sizes)
    return found


def tables(record: dict[str, Any]) -> dict[str, str]:
    found = {model: pair_table(record, model) for model in MODELS}
    return found | {"floors": floor_table(record), "rule": rule_table(record), "about": about(record)}


def about(record: dict[str, Any]) -> str:
    """What was measured, on what."""
    versions, settings, bf16 = record["versions"], record["settings"], record["trained"]["bf16"]["pairs"]["fp32"]
    return (
        f"{settings['responses']} responses of {settings['length']:,} tokens from each engine, on "
        f"{record['machine']['processor']}: vLLM {record['vllm']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}. Entropy {bf16['entropy']:.2f} nats a token; the model solves "
        f"{record['accuracy']:.0%} of held-out problems (greedy)."
    )


def pair_table(record: dict[str, Any], model: str) -> str:
    shown = [n for n in LENGTHS if n <= record["settings"]["length"] and n not in (30, 300)]
    titles = ["engine", "trainer", "noise", "mean", "slope", *(f"rms, {n:,}" for n in shown)]
    titles += [*(f"clipped, {n:,}" for n in shown), "under 5% from", "measured"]
    rows = []
    for each, engine, trainer in PAIRS:
        if each != model or engine not in record[model]:  # --quick does not measure all
            continue
        found = record[model][engine]["pairs"][trainer]
        at = [found["lengths"].index(n) for n in shown]
        rows.append([ENGINES[engine], TRAINERS[trainer], f"{found['noise']:.2e}", size(found["mean"])])
        rows[-1] += [f"{found['slope']:.2f}", *(size(found["rms"][i]) for i in at)]
        rows[-1] += [*(share(found["clipped"][i]) for i in at), tokens(found["fitted_length"])]
        measured = found["measured_length"]
        shortest = " or less" if measured == found["lengths"][0] else ""
        rows[-1] += [f"more than {shown[-1]:,}" if measured is None else f"{measured:,}{shortest}"]
    return lab.table(titles, rows, left=2)


def size(value: float) -> str:
    return f"{value:.1e}"


def share(value: float) -> str:
    return f"{value:.0%}" if value else "0"


def tokens(length: float | None) -> str:
    """With two digits."""
    if length is None:
        return "no length"
    return "1" if length < 1 else f"{float(f'{length:.2g}'):,.0f}"


def rule_table(record: dict[str, Any]) -> str:
    rows = [[f"{each['noise']:g}", tokens(each["length"])] for each in record["rule"]]
    return lab.table(["noise of a token, nats", "fewer than 5% clipped from"], rows, left=0)


def floor_table(record: dict[str, Any]) -> str:
    longest = record["settings"]["length"]
    rows = []
    for (engine, floor), title in FLOORS.items():
        found = record["trained"][engine]["floors"][floor]
        last = found["lengths"].index(longest)
        rows.append([title, size(found["noise"]), size(found["rms"][last]), share(found["clipped"][last])])
    return lab.table(["compared", "noise per token", f"rms, {longest:,} tokens", "clipped"], rows)


def draw(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    figure, (rms, clipped, random_weights) = lab.panels(3, "A bf16 engine before anything was learned, by length")
    for axes, model in ((rms, "trained"), (clipped, "trained"), (random_weights, "random")):
        for (engine, trainer), (color, style) in LINES.items():
            if engine not in record[model]:
                continue
            found = record[model][engine]["pairs"][trainer]
            label = f"{ENGINES[engine]}; {TRAINERS[trainer]}".replace("`", "")
            key = "rms" if axes is rms else "clipped"
            axes.plot(found["lengths"], found[key], style, color=color, label=label)
            if axes is rms:
                continue
            fitted = [clipped_share(n, found["spread"], found["bias"]) for n in found["lengths"]]
            axes.plot(found["lengths"], fitted, ":", color=color, lw=0.8)
        axes.set_xscale("log")
        shown = [n for n in LENGTHS[:-1] if n <= record["settings"]["length"]]
        axes.set_xticks(shown, [f"{n:,}" for n in shown])
        axes.minorticks_off()
        axes.set_xlabel("tokens of a response")
    rms.set(title="Log-ratio of a response, demo's model", ylabel="root mean square, nats", yscale="log")
    rms.axhspan(-LOWEST, HIGHEST, color=lab.GREY, alpha=0.25, lw=0, label="edges of GSPO's clip range, 3e-4 and 4e-4")
    for axes, title in ((clipped, "Clipped, demo's model"), (random_weights, "Clipped, random weights")):
        axes.set(title=title, ylabel="responses that are clipped", ylim=(-0.01, 0.51))
        axes.axhline(LIMIT, color="black", lw=0.8, ls="--", label=f"{LIMIT:.0%}")
        axes.plot([], [], "k:", lw=0.8, label="computed from mean and deviation")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    dashed_and_dotted = clipped.get_legend_handles_labels()[0][-2:]
    clipped.legend(handles=dashed_and_dotted, frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 0.12))
    rms.legend(frameon=False, fontsize=6.5, loc="center right", title="engine; trainer", title_fontsize=7)
    lab.write(figure, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--responses", type=count, help=f"of each engine (default: {Sizes().responses})")
    parser.add_argument("--workers", type=count, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke test that learns next to nothing")
    parser.add_argument("--redraw", action="store_true", help="only figure and tables, from engine-noise.json")
    arguments = parser.parse_args()
    arguments.name, arguments.seeds, arguments.device = "engine-noise", 1, "cpu"
    sizes = SMOKE if arguments.quick else Sizes()
    sizes = replace(sizes, responses=arguments.responses or sizes.responses)
    record = lab.load(arguments) if arguments.redraw else run(arguments, sizes)
    draw(record, arguments)
    page = arguments.output / "engine-noise.md"
    if page.exists():
        page.write_text(lab.fill(page.read_text(), "engine noise", tables(record)))
        print(f"page: {page}")
    print("", *tables(record).values(), sep="\n\n")


if __name__ == "__main__":
    main()
