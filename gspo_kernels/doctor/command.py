"""`python -m gspo_kernels`: what has only to be read comes first, and stays on the screen if a kernel crashes."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from . import advice, checks, environment, machine, services, speed, text, versions
from .findings import SCHEMA, Check, Findings, Speed, as_json, without_names

SUMMARY = "Versions, devices, the backends that serve each dtype, and a check of each against float64."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="machine-readable, for a bug report")
    parser.add_argument("--no-speed", action="store_true", help="measure no speed")


def run(options: argparse.Namespace) -> int:
    """0, or 1 if a check fails."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a standard error that is no file
        faulthandler.enable()  # a kernel that crashes says where
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is found here
        for name, value in _examine(measures_speed=not options.no_speed):
            found[name] = without_names(value)
            if not options.json:
                print(text.section(name, found[name], width), end="", flush=True)
    findings = Findings(schema=SCHEMA, passed=all(each.passed for each in found["checks"]), **found)
    if options.json:
        print(json.dumps(as_json(findings), indent=1, allow_nan=False))
    else:
        print(text.summary(findings, width), end="")
    return 0 if findings.passed else 1


def _examine(measures_speed: bool) -> Iterator[tuple[str, Any]]:
    """The fields of `Findings`: first what only has to be read, then what runs kernels."""
    of_versions, of_processor = versions.versions(), machine.processor()
    yield "versions", of_versions
    yield "processor", of_processor
    gpus = machine.gpus()
    yield "gpus", gpus
    variables = environment.environment()
    yield "environment", variables
    devices = machine.devices(gpus)
    found = tuple(services.service(device, dtype) for device in devices for dtype in services.DTYPES)
    yield "services", found
    yield "checks", checks.with_advice(tuple(_checked(devices)))
    yield "speed", tuple(_timed(devices)) if measures_speed else ()
    nvidia = bool(gpus) or machine.has_nvidia_driver()
    yield "advice", advice.advice(of_versions, of_processor, gpus, variables, found, nvidia)


def _checked(devices: list[torch.device]) -> Iterator[Check]:
    for device in devices:
        try:
            planned = list(checks.checks_on(device))
        except Exception as error:
            yield checks.unusable(device, error)
            continue
        for backend, dtype in planned:
            _progress(f"checking {backend}, {dtype} on {device}")
            yield checks.check(device, backend, dtype)
    _progress("")


def _timed(devices: list[torch.device]) -> Iterator[Speed]:
    for device in devices:
        _progress(f"measuring the speed on {device}")
        yield speed.speed(device)
    _progress("")


def _progress(message: str) -> None:
    """Over the last one, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)
