"""Each private interface of torch that the package uses is there and means what the package takes it to mean."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gspo_kernels
from gspo_kernels.base import torch_internals

PACKAGE = Path(gspo_kernels.__file__).parent
PRIVATE = re.compile(
    r"torch\._[a-zA-Z]|\btorch\.[\w.]*\._\w|functorch\._|_functorch\b|forward_ad\._|\bdist\._\w|distributed_c10d|\bctypes\b"
    r"|\b_device_types\b|DispatchKey"
)


def missing(corner: str, error: Exception) -> str:
    return f"torch {torch.__version__}: {corner} is gone, which torch_internals.py uses: {error!r}"


def test_no_other_module_uses_them() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "torch_internals.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line.partition("#")[0])
    ]
    assert not found, "private interfaces of torch belong into torch_internals.py:\n" + "\n".join(found)


def test_transforms() -> None:
    seen: list[tuple[bool, set[str]]] = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_internals.transforms_are_active(), torch_internals.transforms_of(x)))
        return (x * x).sum()

    x = torch.ones(2)
    try:
        look(x)
        torch.func.grad(look)(x)
        torch.func.vmap(look)(x[None])
        torch.func.grad(lambda y: look(x) + y.sum())(x)  # another tensor is differentiated
        torch.func.grad(lambda y: look(y.detach()) + y.sum())(x)
        torch.func.vmap(torch.func.grad(look))(x[None])
    except (AttributeError, TypeError) as error:
        pytest.fail(missing("functorch's interpreter stack", error))
    assert seen == [
        (False, set()),
        (True, {"Grad"}),
        (True, {"Vmap"}),
        (True, set()),
        (True, set()),
        (True, {"Grad", "Vmap"}),
    ], f"torch {torch.__version__}: functorch's interpreter stack means something else"


def test_tracing() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_internals.is_traced())
        return x + 1

    try:
        look(torch.ones(1))
        make_fx(look)(torch.ones(1))
    except AttributeError as error:
        pytest.fail(missing("torch._C._get_dispatch_mode", error))
    assert seen == [False, True], f"torch {torch.__version__}: make_fx is not seen"


def test_constant_while_compiling() -> None:
    """A compiler calls the function while it traces. A function that it traces itself would append in every call."""
    calls: list[str] = []

    @torch_internals.constant_while_compiling
    def constant() -> int:
        calls.append("called")
        return 2

    compiled = torch.compile(lambda x: x * constant(), fullgraph=True, backend="eager")
    assert [compiled(torch.ones(1)).item() for _ in range(3)] == [2.0] * 3
    assert len(calls) == 1, missing("_dynamo_marked_constant", AttributeError(f"called {len(calls)} times"))


def test_forward_mode() -> None:
    try:
        assert not torch_internals.forward_mode_is_on()
        with forward_ad.dual_level():
            assert torch_internals.forward_mode_is_on()
        assert not torch_internals.forward_mode_is_on()
    except AttributeError as error:
        pytest.fail(missing("forward_ad._current_level", error))


def test_autograd_inside_an_operator() -> None:
    recorded = []

    @torch.library.custom_op("gspo_kernels_tests::looks_for_autograd", mutates_args=())
    def look(x: Tensor) -> Tensor:
        y = torch.ones(2, requires_grad=True)
        recorded.append((y * 2).requires_grad)
        with torch_internals.autograd_inside_an_operator():
            (gradient,) = torch.autograd.grad((y * y).sum(), y)
            recorded.append(torch.equal(gradient, torch.full((2,), 2.0)))
        recorded.append((y * 2).requires_grad)
        return x.clone()

    try:
        look(torch.ones(2))
    except (AttributeError, RuntimeError) as error:
        pytest.fail(missing("torch._C._ForceDispatchKeyGuard or a dispatch key of autograd", error))
    assert recorded == [False, True, False], f"torch {torch.__version__}: the keys of autograd mean something else"


@pytest.mark.parametrize("world", [pytest.param(2, marks=ranks.mark)])
def test_process_groups(world: int) -> None:
    for rank, (found, error) in enumerate(ranks.run(world, look_at_groups)):
        assert error is None, f"torch {torch.__version__}: {error}, on rank {rank}"
        assert found == (True, {"cpu"})


def look_at_groups(rank: int) -> tuple[tuple[bool, set[str]] | None, str | None]:
    group = dist.new_group([0, 1])
    try:
        same = torch_internals.process_group(group.group_name) is group
        return (same, torch_internals.device_types_of(group) & {"cpu"}), None
    except (AttributeError, RuntimeError) as error:
        return None, missing("_resolve_process_group or _device_types", error)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this torch contains no MKL")
@pytest.mark.parametrize("transposed", (False, True))
def test_mkl(transposed: bool) -> None:
    try:
        torch_internals.MklGemm()
    except (OSError, AttributeError) as error:
        pytest.fail(missing("GEMM_BF16BF16F32_64 in libtorch_cpu.so", error))
    gemm = torch_internals.mkl_gemm()
    if gemm is None:
        pytest.skip("MKL has no bf16 product for this processor")
    a, b = torch.arange(12.0).view(4, 3).bfloat16(), torch.arange(15.0).view(3, 5).bfloat16() - 4
    if transposed:
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    out = torch.ones(4, 5)
    gemm(a, b, out, add=True, factor=2.0)
    assert torch.equal(out, 1 + 2 * (a.float() @ b.float()))
    gemm(a, b, out, add=False)
    assert torch.equal(out, a.float() @ b.float())
