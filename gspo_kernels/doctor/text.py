"""The findings as text, a section at a time: what is known is printed before the next thing is tried."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from .checks import SHOWN
from .findings import Advice, Check, Findings, Gpu, Processor, Service, Speed, Variable, Versions

_LABEL = 15  # columns of a label, its indentation included


def sections(findings: Findings, width: int) -> str:
    """All of it."""
    return "".join(section(name, getattr(findings, name), width) for name in SECTIONS) + summary(findings, width)


def section(name: str, value: Any, width: int) -> str:
    """One field of `Findings`; nothing where there is nothing to say."""
    title, lines_of = SECTIONS[name]
    lines = list(lines_of(value, width))
    return "\n".join([title, *lines, "", ""]) if lines else ""


def summary(findings: Findings, width: int) -> str:
    failed = sum(not each.passed for each in findings.checks)
    problems, advice = sum(bool(each.problem) for each in findings.environment), len(findings.advice)
    said = [f"{failed} of {len(findings.checks)} checks FAIL." if failed else f"{len(findings.checks)} checks pass."]
    if problems:
        said.append(f"{problems} environment variable{'s are' if problems > 1 else ' is'} wrong.")
    if advice:
        said.append(f"{advice} suggestion{'s' * (advice > 1)} above.")
    elif not failed and not problems:
        said.append("There is nothing to change.")
    return "\n".join(_wrapped(" ".join(said), width)) + "\n"


def _versions(found: Versions, width: int) -> Iterator[str]:
    commit = f", commit {found.commit}" if found.commit else ""
    yield from _labelled(
        "gspo-kernels", f"{found.gspo_kernels} in {found.location} ({found.installation}{commit})", width
    )
    yield from _labelled("Python", found.python, width)
    yield from _labelled("torch", f"{found.torch}, built for {found.torch_build}", width)
    yield from _labelled("Triton", found.triton or "not installed", width)
    trainers = [
        f"{each.name} {each.version}" + (f" ({each.problem})" if each.problem else "") for each in found.trainers
    ]
    yield from _labelled("trainers", ", ".join(trainers) or "none is installed", width)
    yield from _labelled("system", ", ".join(filter(None, [found.system, found.libc])), width)


def _processor(found: Processor, width: int) -> Iterator[str]:
    cores = f"{found.cores} core{'s' * (found.cores > 1)}"
    cores += f", {found.usable_cores} of them usable" if found.usable_cores < found.cores else ""
    memory = f", {found.memory_bytes / 1e9:.0f} GB" if found.memory_bytes else ""
    yield from _labelled(
        "model", f"{found.model}, {cores}, {found.threads} thread{'s' * (found.threads > 1)}{memory}", width
    )
    seen = ", ".join(found.instruction_sets) or f"unknown; torch uses {found.torch_capability}"
    yield from _labelled("instructions", seen, width)
    if found.problem:
        yield from _labelled("C++ kernels", found.problem, width)
    else:
        of_products = f"; {found.product_kernels} for products" if found.product_kernels != found.kernels else ""
        yield from _labelled("C++ kernels", f"{found.kernels}, {found.chosen_by}{of_products}", width)
    if found.huge_pages:
        yield from _labelled("huge pages", found.huge_pages, width)


def _gpus(found: Sequence[Gpu], width: int) -> Iterator[str]:
    if not found:
        yield "  none that torch can use"
    for gpu in found:
        count = f"{gpu.count} x " if gpu.count > 1 else ""
        driver = f", driver {gpu.driver}" if gpu.driver else ""
        kind = "" if gpu.capability.startswith("gfx") else "compute capability "
        text = f"{count}{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB, {kind}{gpu.capability}{driver}"
        yield from _labelled(gpu.device, text, width)


def _environment(found: Sequence[Variable], width: int) -> Iterator[str]:
    if not found:
        yield "  none is set that matters here"
    for each in found:
        text = f"WRONG: {each.problem}" if each.problem else each.effect
        yield from _wrapped(f"{each.name}={each.value}: {text}", width, "  ")


def _services(found: Sequence[Service], width: int) -> Iterator[str]:
    """Dtypes of which the same is to be said are said together."""
    for device, of_device in groupby(found, lambda each: each.device):
        here = list(of_device)
        for dtypes, text in _together((each.dtype, "\n".join(_backends(each))) for each in here):
            yield f"  {device}, {dtypes}"
            for line in text.splitlines():
                mark, text = (line[:3], line[3:]) if line[:3] in ("-> ", "   ") else ("   ", line)
                yield from _wrapped(text, width, f"  {mark}", "       ")
        if any(each.products for each in here):
            yield f"  {device}, products of hidden states and a head"
        for dtypes, text in _together((each.dtype, each.products or _problem(each)) for each in here):
            yield from _wrapped(f"{dtypes}: {text}", width, "    ")


def _problem(found: Service) -> str:
    return f"{'PROBLEM' if found.backends else 'nothing runs'}: {found.problem}"


def _backends(found: Service) -> Iterator[str]:
    for each in found.backends:
        yield f"{'->' if each.runs else '  '} {each.name} ({each.description}): {'runs, ' * each.runs}{each.reason}"
    if found.token_stage:
        yield f"token stage: {found.token_stage}"


def _checks(found: Sequence[Check], width: int) -> Iterator[str]:
    """The largest relative error of each number; failures in full below."""
    if not found:
        return
    legend = (
        "token and others: the gradient of the logits in the column of the token, and in the other columns; hidden and "
        "head: the gradients of a loss from hidden states"
    )
    yield from _wrapped(legend, width, "  ", "  ")
    for device, of_device in groupby(found, lambda each: each.device):
        here = list(of_device)
        columns = [name for name in SHOWN if any(m.name == name for each in here for m in each.measures)]
        titles = ["", *(SHOWN[name] for name in columns)]
        rows = [_cells(each, columns) for each in here]
        first = max(len(row[0]) for row in rows)
        for row in (titles, *rows):
            numbers = "".join(f"{cell:>8}" for cell in row[1:])
            yield f"  {device if row is titles else row[0]:<{first}}{numbers}"
    failures = ((f"{each.backend} {each.dtype} on {each.device}", _failure(each)) for each in found if not each.passed)
    for names, lines in _together(failures):
        yield ""
        yield from _wrapped(f"FAIL {names}", width, "  ")
        for line in lines.splitlines():
            yield from _wrapped(line, width, "    ")


def _cells(check: Check, columns: Sequence[str]) -> list[str]:
    errors = {measure.name: "NaN" if measure.error is None else f"{measure.error:.0e}" for measure in check.measures}
    return [
        f"{'ok  ' if check.passed else 'FAIL'} {check.backend} {check.dtype}",
        *(errors.get(x, "-") for x in columns),
    ]


def _failure(check: Check) -> str:
    lines = []
    for measure in check.measures:
        if not measure.passed:
            error = "not a number" if measure.error is None else f"off by {measure.error:.1e} of its size"
            lines.append(f"{measure.detail}; {error}, {measure.allowed:.1e} is allowed")
    lines += [f"raised {check.raised}"] if check.raised else []
    return "\n".join([*lines, f"What to do: {check.advice}"])


def _speed(found: Sequence[Speed], width: int) -> Iterator[str]:
    """Bytes per second: of a copy, and of losses with their share of a copy's."""
    if any(each.timings for each in found):
        yield f"  {'':{_LABEL - 2}}{'a copy':<11}{'forward':<17}and backward"
    for each in found:
        if each.problem:
            yield from _labelled(each.device, f"not measured: {each.problem}", width)
        for dtype, of_dtype in groupby(each.timings, lambda timing: timing.dtype):
            timings = list(of_dtype)
            copy = _rate(timings[0].copy_bytes_per_second)
            losses = "".join(f"{f'{_rate(x.bytes_per_second)} ({x.copy_share:.0%})':<17}" for x in timings)
            backend = f"{timings[0].backend}, {timings[0].rows} rows"
            yield f"  {f'{each.device}, {dtype}':<{_LABEL - 2}}{copy:<11}{losses}{backend}"


def _advice(found: Sequence[Advice], width: int) -> Iterator[str]:
    for each in found:
        yield from _wrapped(f"- {each.gain}:", width, "  ", "    ")
        yield from (f"      {command}" for command in each.commands)  # never broken: it is to be copied


SECTIONS: dict[str, tuple[str, Callable[[Any, int], Iterator[str]]]] = {
    "versions": ("Versions", _versions),
    "processor": ("Processor", _processor),
    "gpus": ("GPUs", _gpus),
    "environment": ("Environment variables", _environment),
    "services": ("What runs", _services),
    "checks": ("Checks against float64, the largest relative errors", _checks),
    "speed": ("Speed of a GSPO loss, measured quickly on the machine as it is loaded now", _speed),
    "advice": ("To get more", _advice),
}


def _together(said: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(names, text), the names of equal texts joined."""
    found: dict[str, list[str]] = {}
    for name, text in said:
        found.setdefault(text, []).append(name)
    return [(", ".join(names), text) for text, names in found.items()]


def _labelled(label: str, text: str, width: int) -> list[str]:
    return _wrapped(text, width, f"  {label:<{_LABEL - 2}}", " " * _LABEL)


def _wrapped(text: str, width: int, indent: str = "", following: str | None = None) -> list[str]:
    following = f"{indent}  " if following is None else following
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=following, break_long_words=False, break_on_hyphens=False
    )


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.{0 if bytes_per_second >= 1e11 else 1}f} GB/s"
