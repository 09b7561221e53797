"""The kernels of csrc/cuda as fibers of this machine: the program of gpu_on_host/ checks them against sums in double.

A thread sanitizer sees every race that the barriers of a GPU would have to prevent; mutants are run under it, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from modes import DEFAULT_MODE

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "g++")
Mutant = dict[str, str]  # what is replaced by what

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler here"),
]


def build(folder: Path, *flags: str, mutant: Mutant | None = None, of: str = "rows") -> Path:
    """The program `of`, of a copy of the kernels in which each text of `mutant`, found once, is replaced."""
    for part in ("csrc", "tests/support/gpu_on_host"):
        shutil.copytree(ROOT / part, folder / part)
    sources = [*(folder / "csrc/cuda").glob("*.cuh"), folder / "csrc/token_slope.h"]
    kernels = {path: path.read_text() for path in sources}
    for old, new in (mutant or {}).items():
        assert sum(text.count(old) for text in kernels.values()) == 1, f"a mutant that is none: {old}"
        kernels = {path: text.replace(old, new) for path, text in kernels.items()}
    for path, text in kernels.items():
        path.write_text(text)
    program, source = folder / of, folder / f"tests/support/gpu_on_host/{of}.cpp"
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"] if mutant is None else ["-w"]
    flags = (*warnings, "-DGSPO_ON_HOST", f"-I{source.parent}", *flags)
    subprocess.run([COMPILER, "-std=c++17", "-O1", *flags, str(source), "-o", str(program)], check=True)
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(program)], capture_output=True, text=True, timeout=1800, env=environment)


def test_rows(tmp_path: Path) -> None:
    done = run(build(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


WRONG: dict[str, tuple[Mutant, str]] = {  # and what is said of it
    "the target in the sums": (
        {"    put(of_target, (span.phase + target) % Columns<T>::kWidth, minus_infinity(T{}));\n": ""},
        "logprob is wrong",
    ),
    "the target stays in its slice": ({"    at_target = without;\n": ""}, "logprob is wrong: bfloat16, resident"),
    "the target's group summed with the target": (
        {"stop = of_target < 0 ? last : begin + of_target / kStride * kStride;": "stop = last;"},
        "logprob is wrong: bfloat16, again, 2 clusters of 1, V = 18995",
    ),
    "what is behind the target's group skipped": (
        {"part = 0; part < 2; ++part, stop = last": "part = 0; part < 1; ++part, stop = last"},
        "logprob is wrong",
    ),
    "no edge at the end": (
        {"if (threadIdx.x < 2) {\n    const int at_edge": "if (threadIdx.x < 1) {\n    const int at_edge"},
        "logprob is wrong",
    ),
    "-inf is never bounded": (
        {"running = uncapped_sums<true>(": "running = uncapped_sums<false>("},
        "entropy is wrong",
    ),
    "large logits by rounded exponents": (
        {"sums = running.too_far() ? ties_of(": "sums = false ? ties_of("},
        "is wrong: bfloat16",
    ),
    "edges without ties": (
        {"  if (at_edge >= 0) ties.add<T>(slice.edge(at_edge, slice.target));\n": ""},
        "is wrong: bfloat16",
    ),
    "the gradient's scale too small": (
        {"(127u + 127u + 31u - exponent)": "(127u + 127u - exponent)"},
        "gradient is wrong",
    ),
    "the rounding of a thread's maximum": ({"fmaf(-largest, scale, top)": "0.0f"}, "logprob is wrong"),
    "entropy of lanes not shifted": (
        {"(of_lane.weighted + of_lane.total * shift) * shrink;": "of_lane.weighted * shrink;"},
        "entropy is wrong",
    ),
    "no slope": ({"return slope == 0.0 ? 0.0 : upstream * slope;": "return upstream;"}, "gradient is wrong"),
    "another row's advantage": ({"slope.advantages[row]": "slope.advantages[0]"}, "gradient is wrong"),
    "the old log-probability for the rollout's": ({"slope.rollout_logprobs ? ": "false ? "}, "by TV"),
    "no zeros": ({"write_zeros<kThreads>(task.slice, task.gradient);": ";"}, "gradient is wrong"),
    "the next row from a stale ticket": (
        {"next_row = shared.exchange.next[turn];": "next_row = shared.exchange.next[turn ^ 1] % 128;"},
        "is wrong",
    ),
    "a warp of the block not in its sums": (
        {"    if (lane < kWarps) {\n": "    if (lane < kWarps / 2 * 2) {\n"},
        "logprob is wrong: bfloat16",
    ),
    "the next row copied early where it lies otherwise": (
        {"Span<T>(gradient, slice.columns).phase == slice.span.phase && next.span": "true || next.span"},
        "gradient is wrong: bfloat16, resident",
    ),
    "the next row not copied at all": (
        {"copy_async_if(needed, buffer_": "copy_async_if(false, buffer_"},
        "logprob is wrong: bfloat16, resident",
    ),
    "no wait for the copies": ({"      source.await();\n": ""}, "logprob is wrong: bfloat16, resident"),
    "edges of the next row not copied early": (
        {"if (next) source.copy_edges(*next);": ";"},
        "gradient is wrong: bfloat16, resident",
    ),
    "blocks do not wait for each other to begin": (
        {"sync_cluster();  // a block that has not begun": "__syncthreads();  // a block that has not begun"},
        "block 0 reaches for block 1 of its cluster, which has not begun",
    ),
    "no derivative of the cap": (
        {"multiply_flushed(derivative, row.constant)": "0.25f * row.constant"},
        "capped, row 0, column",
    ),
    "no derivative of the cap at the target": (
        {"tanh_scale * tanh_slope(tanh_scale * logit)": "tanh_scale"},
        "capped, row 0, column",
    ),
    "a capped logit rounded to float": (
        {
            "return e.minus(pivot) * reciprocal(e.minus(-1.0f));": (
                "const float y = 1.0f - 2.0f * reciprocal(e.value() + 1.0f), base = 1.0f - 2.0f / (pivot + 1.0f);"
                "return (y - base) * 0.5f * (pivot + 1.0f);"
            )
        },
        "logprob is wrong: bfloat16",
    ),
    "E rounded before the pivot is subtracted": (
        {"return fmaf(power, part, power - pivot);": "return fmaf(power, part, power) - pivot;"},
        "logprob is wrong: bfloat16",
    ),
    "the target in capped sums": ({"left_out = 1u << (slice": "left_out = 0u << (slice"}, "capped, row"),
    "columns of other rows in capped sums": ({"left_out |= 1u << i;": ";"}, "capped, row"),
    "capped logits far beyond the cap": (
        {"within.words[i] = bounded_pair(v.words[i], most);": "within.words[i] = v.words[i];"},
        "logprob is wrong: bfloat16",
    ),
    "pivots of lanes not brought together": (
        {"shift = fmaxf(from_pivot_to(own, sums.largest, steepness(sums.largest, scale)), kLeast);": "shift = 0.0f;"},
        "logprob is wrong: bfloat16",
    ),
    "a barrier that some threads do not come to": (
        {"  }  // and after the last": "  }\n  if (threadIdx.x < kWarp) __syncthreads();  // and after the last"},
        "__syncthreads of block 0: 32 of 96 threads came",
    ),
}


def some(names: Iterable[str], chosen: set[str]) -> list[ParameterSet]:
    """One mutant of each group; the others run with --all."""
    return [pytest.param(name, marks=() if name in chosen else pytest.mark.only_with_all) for name in names]


CHOSEN_WRONG = {
    "the target in the sums",
    "-inf is never bounded",
    "the old log-probability for the rollout's",
    "the next row from a stale ticket",
    "no derivative of the cap",
    "a capped logit rounded to float",
    "a barrier that some threads do not come to",
}


@pytest.mark.parametrize("name", some(WRONG, CHOSEN_WRONG))
def test_wrong_kernels_are_found(name: str, tmp_path: Path) -> None:
    mutant, said = WRONG[name]
    done = run(build(tmp_path, "-DGSPO_FEW", mutant=mutant))
    assert done.returncode != 0
    assert said in done.stderr


def check_slopes(folder: Path, mutant: Mutant | None) -> None:
    done = run(build(folder, mutant=mutant, of="slopes"))
    assert (done.returncode == 0) == (mutant is None), done.stdout + done.stderr


SLOPES: dict[str, Mutant | None] = {
    "right": None,
    "the lower bound is outside": {"moved < range.low": "moved <= range.low"},
    "the upper bound is outside": {"moved > range.high": "moved >= range.high"},
    "one range": {"? loss.positive : loss.negative": "? loss.positive : loss.positive"},
    "the other range": {"? loss.positive : loss.negative": "? loss.negative : loss.positive"},
    "exp(r) - 1 by a subtraction": {
        "std::expm1(saturated ? loss.max_log_ratio : log_ratio)":
        "std::exp(saturated ? loss.max_log_ratio : log_ratio) - 1.0"
    },
    "nothing saturates": {"log_ratio > loss.max_log_ratio": "false"},
    "the largest log-ratio saturates": {"log_ratio > loss.max_log_ratio": "log_ratio >= loss.max_log_ratio"},
    "what saturates has a slope": {"saturated && loss.max_weight == INFINITY": "false"},
    "what saturates is not truncated": {"saturated && loss.max_weight == INFINITY": "saturated"},
    "nothing is truncated": {"if (weight > loss.max_weight) weight = loss.max_weight;": ""},
    "nothing is held": {"loss.hold && (below || above);\n  double": "false;\n  double"},
    "held at one bound": {"below ? range.low : range.high": "range.high"},
    "dropped where it is held": {"!loss.hold && (": "("},
    "nothing is dropped": {"(dropped ? 0.0 : -weight * token.advantage)": "(-weight * token.advantage)"},
    "no penalty": {" + loss.penalty * log_ratio": ""},
    "a penalty of the ratio": {"loss.penalty * log_ratio": "loss.penalty * deviation"},
    "a dropped NaN of an advantage": {" || token.advantage != token.advantage": ""},
    "a NaN of a rollout": {"moved != moved || ": ""},
    "inf - inf": {"x > 1e30 ? 1e30 : x < -1e30 ? -1e30 : x": "x"},
    "KL for TV": {"if (measure == Measure::kTv)": "if (false)"},
    "TV for KL": {"if (measure == Measure::kTv)": "if (true)"},
    "a difference without its sign": {"step > 0.0 ? difference : -difference": "difference"},
    "a difference of near-equal numbers": {"p * -std::expm1(-apart)": "p - p * std::exp(-apart)"},
    "the smaller probability": {"step > 0.0 ? logprob : rollout_logprob": "step > 0.0 ? rollout_logprob : logprob"},
    "KL(pi || mu)": {"step > 0.0 ? p - difference : p": "step > 0.0 ? p : p - difference"},
    "the others of one policy": {"step > 0.0 ? rest + difference : rest": "rest"},
    "-0.0 of certain tokens": {"0.0 - std::expm1(larger)": "-std::expm1(larger)"},
    "1 - p by a subtraction": {"0.0 - std::expm1(larger)": "1.0 - p"},
    "0 * inf of certain tokens": {"(others > 0.0 ? others * std::log1p(difference / rest) : 0.0)":
                                  "others * std::log1p(difference / rest)"},
    "log1p by log": {"std::log1p(difference / rest)": "std::log(1.0 + difference / rest)"},
}  # fmt: skip
CHOSEN_SLOPES = {"right", "the lower bound is outside", "what saturates is not truncated", "the others of one policy"}


@pytest.mark.parametrize("name", some(SLOPES, CHOSEN_SLOPES))
def test_slopes(name: str, tmp_path: Path) -> None:
    """The formula of csrc/token_slope.h alone."""
    check_slopes(tmp_path, SLOPES[name])


RACES: dict[str, Mutant | None] = {
    "sound": None,
    "no barrier behind the first row's task": {"sync_cluster();  // a block that has not begun": "//"},
    "no barrier among a block's warps": {"__syncthreads();\n    if (warp > 0) return;": "if (warp > 0) return;"},
    "no wait for what blocks send": {"      wait_for_phase(&landed[turn], parity);\n": "(void)parity;"},
    "no barrier before the gradient": {
        "__syncthreads();\n    const GradientOf<Cap> gradient": "const GradientOf<Cap> gradient"
    },
    "no barrier before the next row's copies": {"        __syncthreads();  // every thread is done": "//"},
    "the next row's vector copied by another thread": {
        "copy_async_if(needed, buffer_ + v, from + v)": "copy_async_if(needed, buffer_ + (v ^ 1), from + (v ^ 1))"
    },
    "the next row's number read late": {
        "static_cast<int64_t>(next_row)": "static_cast<int64_t>(shared.exchange.next[turn])"
    },
    "sums in one place": {
        "Partial of_blocks[2]": "Partial of_blocks[1]",
        "of_blocks[turn][rank_in_cluster()]": "of_blocks[0][rank_in_cluster()]",
        "of_blocks[turn][block]": "of_blocks[0][block]",
    },
    "one task": {
        "Task<T> task[2];": "Task<T> task[1];",
        "shared.task[turn].row": "shared.task[0].row",
        "task = shared.task[turn];": "task = shared.task[0];",
        "next = shared.task[turn ^ 1];": "next = shared.task[0];",
        "shared.task[turn ^ 1].prepare": "shared.task[0].prepare",
    },
    "one ticket": {
        "uint64_t next[2];": "uint64_t next[1];",
        "&next[turn ^ 1]": "&next[0]",
        "next_row = shared.exchange.next[turn];": "next_row = shared.exchange.next[0];",
    },
}


def check_races(folder: Path, mutant: Mutant | None) -> None:
    done = run(build(folder, "-DGSPO_FEW", "-fsanitize=thread", mutant=mutant))
    assert (done.returncode == 0) == (mutant is None), done.stdout + done.stderr
    assert ("data race" in done.stderr) == (mutant is not None), done.stderr


CHOSEN_RACES = {"sound", "no barrier among a block's warps", "no wait for what blocks send", "sums in one place"}


@pytest.mark.parametrize("name", some(RACES, CHOSEN_RACES))
def test_races(name: str, tmp_path: Path) -> None:
    check_races(tmp_path, RACES[name])
