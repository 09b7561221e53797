"""docs/rollout.md shows the tables that the examples with a real engine print from their records."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from modes import DEFAULT_MODE

ROOT = Path(__file__).parents[2]
NEEDED = ("transformers", "tokenizers", "matplotlib", "tqdm")
pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason="needs the demo's packages: make demo"),
]


@pytest.mark.parametrize(
    ("name", "record"), [("replay", "routing-replay.json"), ("asynchronous", "weight-versions.json")]
)
def test_the_page_shows_the_table_of_a_record(name: str, record: str) -> None:
    for folder in (ROOT / "examples", ROOT / "examples" / "paper"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    table = import_module(name).table(json.loads((ROOT / "docs" / record).read_text()))
    assert table in (ROOT / "docs" / "rollout.md").read_text(), f"show the record's table:\n{table}"
