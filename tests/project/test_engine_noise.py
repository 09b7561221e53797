"""examples/engine_noise.py: the arithmetic of the lengths, and the page that shows the record. vLLM is not needed."""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modes import DEFAULT_MODE

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import engine_noise  # noqa: E402
from engine_noise import lab  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]


def test_the_shares_of_normal_log_ratios() -> None:
    # Both edges far away on the scale of the deviation: half of each tail; a negative mean helps one sign only.
    assert engine_noise.clipped_share(1, spread=1.0, bias=0.0) == pytest.approx(0.5, abs=1e-3)
    assert engine_noise.clipped_share(1e9, spread=1e-2, bias=-5e-5) == 0
    assert engine_noise.clipped_share(1e9, spread=3e-2, bias=-4e-4) == 0.5  # all with a negative advantage
    one_deviation = 0.158655  # of a normal distribution is beyond it, on one side
    upper = engine_noise.clipped_share(1, spread=4e-4, bias=0.0)
    lower = 0.5 * (one_deviation + math.erfc(0.75 / math.sqrt(2)) / 2)
    assert upper == pytest.approx(lower, rel=1e-3)


def test_the_length_is_where_the_share_crosses_the_limit() -> None:
    for noise in (1e-3, 1e-2, 2e-2):
        length = engine_noise.expected_length(noise)
        assert length is not None
        shares = [engine_noise.clipped_share(x * length, noise, -(noise**2) / 2) for x in (0.98, 1.02)]
        assert shares[1] < engine_noise.LIMIT < shares[0]
    assert engine_noise.expected_length(2.5e-2) is None  # the mean, -3.1e-4, is outside


def test_independent_errors_average_out_and_others_do_not() -> None:
    torch.manual_seed(0)
    engine = torch.full((400, 1000), -1.0).double()
    independent = engine_noise.compare(engine + 3e-3 * torch.randn(400, 1000).double(), engine)
    assert independent["slope"] == pytest.approx(-0.5, abs=0.05)
    assert independent["noise"] == pytest.approx(3e-3, rel=0.01)
    assert independent["bias"] == pytest.approx(-4.5e-6, rel=0.05)  # half of the variance
    assert independent["mismatch"]["clip_fraction"] == pytest.approx(independent["clipped"][-1], abs=0.02)
    fitted, measured = independent["fitted_length"], independent["measured_length"]
    assert engine_noise.expected_length(3e-3) == pytest.approx(fitted, rel=0.25) == pytest.approx(measured, rel=0.5)
    shared = engine_noise.compare(engine + 3e-3 * torch.randn(400, 1).double(), engine)
    assert shared["slope"] == pytest.approx(0, abs=0.01)
    assert shared["measured_length"] is None
    assert shared["clipped"][-1] == pytest.approx(0.45, abs=0.03)
    equal = engine_noise.compare(engine, engine)
    assert equal["noise"] == 0 and equal["measured_length"] == 10


def test_a_measured_length_is_followed_by_no_larger_share() -> None:
    assert engine_noise.measured_length([10, 20, 30], [0.04, 0.2, 0.01]) == 30
    assert engine_noise.measured_length([10, 20, 30], [0.2, 0.04, 0.01]) == 20
    assert engine_noise.measured_length([10, 20, 30], [0.0, 0.0, 0.2]) is None


def test_shares_count_each_edge_for_the_sign_that_it_clips() -> None:
    errors = torch.tensor([[5e-4, 5e-4], [3.5e-4, 3.5e-4], [-3.5e-4, -3.5e-4], [0.0, 1e-3]]).double()
    found = engine_noise.by_length(errors, [1, 2])
    assert found["outside"] == [0.5, 0.75] and found["clipped"] == [0.25, 0.375]
    assert found["rms"][0] == pytest.approx(math.sqrt((25 + 2 * 12.25) / 4) * 1e-4)


def test_the_page_shows_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "write", lambda figure, arguments: lab.plt.close(figure))
    record = json.loads((ROOT / "docs" / "engine-noise.json").read_text())
    page = (ROOT / "docs" / "engine-noise.md").read_text()
    assert engine_noise.lab.fill(page, "engine noise", engine_noise.tables(record)) == page, (
        "python examples/engine_noise.py --redraw --output docs"
    )
    assert all(text in page for text in engine_noise.tables(record).values())
    engine_noise.draw(record, SimpleNamespace(name="engine-noise", output=None))
