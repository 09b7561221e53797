"""The paper's experiments: pages and records agree, records hold nothing else, and clipping is counted."""

from __future__ import annotations

import json
import sys
from collections.abc import ItemsView, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

from gspo_kernels import GRPO, GSPO, policy_loss_from_logprobs

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "examples" / "paper")]

import lab  # noqa: E402
import page  # noqa: E402
import stability  # noqa: E402
import weights  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones, advantages of each sign and 0, and a ragged mask: much is clipped by every rule."""
    generator = torch.Generator().manual_seed(0)
    highest = -torch.rand(32, 9, generator=generator)  # of the two
    log_ratio = 0.25 * torch.randn(32, 9, generator=generator)
    log_ratio[::2] = 3e-4 * torch.randn(16, 9, generator=generator)
    logprobs, old = highest + log_ratio.clamp(max=0.0), highest - log_ratio.clamp(min=0.0)
    mask = (torch.arange(9) < torch.randint(1, 10, (32, 1), generator=generator)).long()
    advantages = torch.randn(32, generator=generator)
    advantages[5:9] = 0
    return logprobs, old, advantages, mask


def test_the_pages_show_the_records() -> None:
    changed = [path.name for path in page.pages() if page.fill(path) != path.read_text()]
    assert not changed, "run examples/paper/page.py"


BLOCKS = {page.block_of(found) for path in page.pages() for found in page.BLOCK.finditer(path.read_text())}
SCRIPTS: dict[str, list[str]] = {path.stem: [] for path in sorted(page.RECORDS.glob("*.json"))}  # that show a record
for script in sorted({block.name for block in BLOCKS if find_spec(block.name)}):
    if (name := page.record_of(import_module(script))) in SCRIPTS:
        SCRIPTS[name].append(script)


def test_every_figure_is_shown() -> None:
    figures = {block.title.removeprefix("figure: ") for block in BLOCKS if block.kind == "figure"}
    missing = {path.stem for path in page.RECORDS.glob("*.png")} - figures
    assert not missing


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_table_and_where_it_is_from_is_shown(name: str) -> None:
    record = json.loads(page.RECORDS.joinpath(f"{name}.json").read_text())
    sections = {script: import_module(script).section(record) for script in SCRIPTS[name]}
    tables = {
        page.Block("table", script, part)
        for script, found in sections.items()
        for part in ([None] if isinstance(found, str) else found)
    }
    assert tables and not tables - BLOCKS
    assert BLOCKS & {page.Block("source", script) for script in SCRIPTS[name]}


SCRIPT = """'All of it. Here.'
section = lambda record: {"a": "| 1 |", "b_c": record["b"]}
"""


def test_a_script_may_have_several_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "two_tables.py").write_text(SCRIPT)
    records, text = tmp_path / "docs" / "records", tmp_path / "docs" / "text.md"
    records.mkdir(parents=True)
    (records / "two_tables.json").write_text('{"b": "| 2 |"}')
    shown = {
        "figure: two_tables": "![All of it. Here](records/two_tables.png)",
        "table: two_tables-a": "| 1 |",
        "table: two_tables-b_c": "| 2 |",
    }
    text.write_text("\n".join(f"<!-- {block} -->\n<!-- end -->" for block in shown))
    assert page.fill(text, records) == "\n".join(f"<!-- {block} -->\n{it}\n<!-- end -->" for block, it in shown.items())
    text.write_text("<!-- table: two_tables -->\n<!-- end -->")
    with pytest.raises(ValueError, match=r"one of `table: two_tables-a`, `.*-b_c`, got `table: two_tables`"):
        page.fill(text, records)


# Where a record's numbers come from.
ORIGIN = {
    *("experiment", "seeds", "seed", "device", "machine", "seconds", "cpu_seconds", "versions", "settings", "long")
}


class Watched(dict[str, Any]):
    """Part of a record, which notes the keys that are read in `seen`, without indices of lists."""

    def __init__(self, part: dict[str, Any], path: str, seen: set[str]) -> None:
        super().__init__({name: watched(value, f"{path}/{name}", seen) for name, value in part.items()})
        self.path, self.seen = path, seen

    def __getitem__(self, name: str) -> Any:
        self.seen.add(f"{self.path}/{name}")
        return super().__getitem__(name)

    def items(self) -> ItemsView[str, Any]:
        self.seen.update(f"{self.path}/{name}" for name in self)
        return super().items()


def watched(value: Any, path: str, seen: set[str]) -> Any:
    if isinstance(value, dict):
        return Watched(value, path, seen)
    return [watched(item, path, seen) for item in value] if isinstance(value, list) else value


def keys(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield f"{path}/{name}"
            yield from keys(item, f"{path}/{name}")
    elif isinstance(value, list):
        for item in value:
            yield from keys(item, path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_record_holds_what_figures_and_tables_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "write", lambda figure, arguments: lab.plt.close(figure))
    text = page.RECORDS.joinpath(f"{name}.json").read_text()
    record, seen = json.loads(text), set[str]()
    for script in SCRIPTS[name]:
        module, whole = import_module(script), watched(record, "", seen)
        module.draw(whole, SimpleNamespace(name=script, output=None))
        module.section(whole)
    unread = {key for key in keys(record) if key not in seen and not ORIGIN & set(key.split("/"))}
    assert not unread, f"neither figure nor table reads {sorted(unread)}"
    assert text == lab.as_text(record) + "\n", "written by another format"


def test_a_block_without_a_record_stays(tmp_path: Path) -> None:
    text = tmp_path / "text.md"
    for name in ("weights", "not_a_script"):
        text.write_text(f"before\n<!-- table: {name} -->\nas it was\n<!-- end -->\nafter")
        assert page.fill(text, tmp_path) == text.read_text()


def test_weights_are_ratios_where_they_are_not_clipped() -> None:
    logprobs, old, advantages, mask = batch()
    log_ratio = ((logprobs - old) * mask).double()
    of_sequence = (log_ratio.sum(1) / mask.sum(1)).exp()[:, None].expand_as(log_ratio)
    for objective, ratio in ((GRPO(), log_ratio.exp()), (GSPO(), of_sequence)):
        above = (advantages[:, None] > 0) & (ratio > 1 + objective.eps_high)
        below = (advantages[:, None] < 0) & (ratio < 1 - objective.eps_low)
        expected = torch.where(above | below, 0.0, ratio)
        expected = torch.where((mask == 1) & (advantages[:, None] != 0), expected, torch.nan)
        found = weights.token_weights(objective, logprobs, old, advantages, mask)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0, equal_nan=True)
        assert (found == 0).any()
        assert (found > 0).any()


@pytest.mark.parametrize("rule", stability.RULES)
def test_the_meter_counts_as_the_losses_do(rule: str) -> None:
    logprobs, old, advantages, mask = batch()
    meter = stability.Meter(steps=1)
    meter.add(1, 0, logprobs, old, advantages, mask)
    _, stats = policy_loss_from_logprobs(logprobs, advantages, old, objective=stability.RULES[rule], mask=mask)
    found = meter.shares("gspo")["all"][rule]["sequences" if stats.ratio_of == "sequence" else "tokens"]
    assert found == pytest.approx(stats.clip_fraction.item(), rel=1e-6)
    assert found > 0.05


def test_the_meter_sorts_by_length_and_depth() -> None:
    logprobs, old, advantages, mask = batch()
    meter = stability.Meter(steps=20)
    for depth in range(2):
        meter.add(20, depth, old if depth == 0 else logprobs, old, advantages, mask)
    shares, grpo = meter.shares("gspo"), meter.shares("grpo")
    length = mask.sum(1)
    assert shares["length"]["responses"] == [2 * int((length <= 5).sum()), 2 * int((length > 5).sum()), 0, 0, 0, 0]
    assert shares["length"]["tokens"][2] is None
    assert grpo["depth"]["tokens"][0] == 0
    assert grpo["depth"]["tokens"][1] > 0.05
    assert shares["stage"]["responses"] == [64]


def test_the_largest_fall_is_from_the_best_before_it() -> None:
    assert stability.largest_fall([0.5, 0.7, 0.6, 0.9, 0.65, 0.8]) == pytest.approx(0.25)
    assert stability.largest_fall([0.1, 0.2]) == 0
