"""Uninitialised memory is NaN: what a kernel forgets to write, or reads before writing, cannot pass by luck."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modes
import pytest
import torch
import torch.distributed as dist
from modes import INTERPRETED, ON_GPU

pytest.register_assert_rewrite("batches", "checks", "linear", "mistakes", "row_batches", "trl_trainers")


with contextlib.suppress(ImportError):  # a GPU machine may have none
    from hypothesis import HealthCheck, settings

    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")  # which may be busy


def hasten_interpreter() -> None:
    """Once will do for what the interpreter does at every call in a kernel and at every operation.

    It patches Triton's language, two thirds of its time, and makes a table of dtypes, a tenth of the rest. It also
    computes whether integers overflow, a sixth, which nothing reads unless it runs for debugging.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.5 and later
        interpreter._patch_attr = patch_attribute
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    if hasattr(interpreter, "_get_np_dtype"):
        make, known = interpreter._get_np_dtype, dict[str, Any]()

        def get(kind: Any) -> Any:
            name = kind.scalar.name  # of a block's elements, which decide alone; not all kinds hash
            if name not in known:
                known[name] = make(kind)
            return known[name]

        interpreter._get_np_dtype = get
    if hasattr(interpreter, "interpreter_builder"):
        options = interpreter.interpreter_builder.options
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=options.debug)


def hasten_types() -> None:
    """The same of what Triton's language asks about types: shapes are those of a type, and equal types need no cast."""
    import triton.language as tl
    from triton.language import semantic

    make = tl.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("_of_tensors")
        if known is None:
            make(self, handle, type)
            type._of_tensors = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
        else:
            vars(self).update(known, handle=handle, type=type)

    tl.tensor.__init__ = init
    if not hasattr(semantic, "TritonSemantic"):  # before Triton 3.4
        return
    check = semantic.TritonSemantic.binary_op_type_checking_impl
    constants = dict[Any, Any]()  # a number as a tensor, by what it is combined with

    def quick(self: Any, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
        if type(lhs) is not tl.tensor:
            return check(self, lhs, rhs, *options, **named)
        kind = lhs.dtype
        if type(rhs) is tl.tensor:
            if (kind is rhs.dtype or kind == rhs.dtype) and (kind.is_fp32() or kind.is_int()) and lhs.type == rhs.type:
                return lhs, rhs
        elif type(rhs) in (int, float):
            key = rhs, type(rhs), kind.name, tuple(lhs.type.shape) if lhs.type.is_block() else (), options
            if key in constants and not named:
                return lhs, constants[key]
            found = check(self, lhs, rhs, *options, **named)
            if found[0] is lhs and not named:
                constants[key] = found[1]
            return found
        return check(self, lhs, rhs, *options, **named)

    semantic.TritonSemantic.binary_op_type_checking_impl = quick

    unwrap = tl.core._unwrap_if_constexpr
    tl.core._unwrap_if_constexpr = lambda x: x if type(x) is tl.tensor else unwrap(x)


def patch_attribute(place: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """As Triton's interpreter does it, with one call less for each operation."""
    from triton.language.semantic import TritonSemantic

    plain, semantic = inspect.unwrap(member), TritonSemantic(builder)

    def called(*arguments: Any, **named: Any) -> Any:
        named["_semantic"] = semantic
        return plain(*arguments, **named)

    scope.set_attr(place, name, called)


if INTERPRETED:
    hasten_interpreter()
    hasten_types()


@pytest.fixture(autouse=True)
def nan_filled_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty, empty_like, new_empty and resize_ give NaN (integers: the largest).

    Every kernel writes into tensors made this way, also on a GPU. A test marked `plain_memory` runs without it.
    """
    if request.node.get_closest_marker("plain_memory"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """The thread count is put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup | None]:
    """This process alone: all that is sharded runs with it, in every mode, its collectives among them."""
    if not dist.is_available() or not (dist.is_nccl_available() if ON_GPU else dist.is_gloo_available()):
        yield None
        return
    dist.init_process_group("nccl" if ON_GPU else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def pytest_addoption(parser: pytest.Parser) -> None:
    everything = "every combination of parameters, and every mutant of the GPU's kernels: half an hour more"
    parser.addoption("--all", action="store_true", help=everything)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ["GSPO_KERNELS_TEST_ALL"] = "1"  # for what test modules make of OBJECTIVES, also in ranks
        modes.WHOLE = True
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:  # else they wait for each other's cores
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # of processes that tests start
    config.addinivalue_line("markers", "plain_memory: torch.empty stays uninitialised")
    config.addinivalue_line("markers", "only_with_all: runs with --all alone, for others find the same faults")
    config.addinivalue_line("markers", "every_objective: each objective meets every other parameter (modes.py)")
    config.addinivalue_line("markers", "each_objective: each objective is met at least once (modes.py)")
    # Kernels select an inf * 0 away as a GPU does, in silence; numpy speaks of each.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Modules of which this mode skips every test are not imported, for some import trainers for seconds."""
    if not (INTERPRETED or ON_GPU) or collection_path.suffix != ".py":
        return None
    skipped = "DEFAULT_MODE|NOT_INTERPRETED" if INTERPRETED else "DEFAULT_MODE"
    return (
        True if re.search(rf"^pytestmark = (\[\s*)?({skipped})\b", collection_path.read_text(), re.MULTILINE) else None
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test's product of parameters what `modes.every_pair` keeps; with --all and on a GPU the whole product."""
    if modes.WHOLE:
        return
    from batches import KINDS, OBJECTIVES, attributes_of

    def values_of(parameter: str, value: Any, every: bool) -> list[Hashable]:
        """What a parameter of a test stands for in `modes.every_pair`."""
        # A value is known by its identity: all items of a test hold the same objects, and not all of them hash.
        if parameter != "objective" or not isinstance(value, str) or value not in OBJECTIVES:
            return [id(value)]
        if INTERPRETED:
            return [x for x in attributes_of(value) if x[0] in ("ratio_of", "uses_logprobs")]
        return [*attributes_of(value), *([value] if every else [])]

    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("only_with_all") is None:
            tests[item.nodeid.partition("[")[0]].append(item)
    kept = set[pytest.Item]()
    for group in tests.values():
        every, each = (group[0].get_closest_marker(f"{x}_objective") is not None for x in ("every", "each"))
        needed = OBJECTIVES if every or each else KINDS
        points = [[values_of(*of, every) for of in parameters_of(item).items()] for item in group]
        kept.update([group[k] for k in modes.every_pair(points)] if points[0] else group)
        kept.update(of_objectives(needed, group, kept, 3 if every else 1))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def parameters_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def of_objectives(names: Sequence[str], items: Sequence[Any], kept: set[Any], count: int) -> list[Any]:
    """`count` items of each of these objectives that none of `kept` has; what else they have goes round."""
    found = []
    for k, name in enumerate(names):
        mine = [item for item in items if parameters_of(item).get("objective") == name]
        if mine and kept.isdisjoint(mine):
            found += [mine[(7 * k + j * len(mine) // count) % len(mine)] for j in range(count)]
    return found
