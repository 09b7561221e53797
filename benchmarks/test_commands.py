"""Every command of this folder runs at tiny sizes, reads what it writes, and the pages have the committed numbers."""

from __future__ import annotations

import json
import pickle
import sys
import time
from pathlib import Path

import pytest

from gspo_kernels.losses import triton_stage_kernels

from . import context, gpu_kept_model, gpu_model, host, kept_head, linear, linear_precision, linear_tf32, peers, plot
from . import gpu_page as page
from .cases import DENSE, FORWARD, INACTIVE, Problem, linear_case, linear_smoke
from .contestants import Contestant, Run
from .results import REPOSITORY, committed, load, newest


def test_linear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "linear.json"
    assert linear.main(["--smoke", "--save", str(path)]) == 0
    cases = load(path)["cases"]
    assert len(cases) == 4
    for case in cases.values():
        found = case["contestants"]
        assert {"ours", "products", "eager"} <= found.keys() and not found["eager"]["wrong"]
        assert found.keys() | case["absent"].keys() | case["errors"].keys() == linear.BY_NAME.keys()
    capsys.readouterr()
    assert linear.main(["--markdown", str(path)]) == 0
    assert "| gspo-kernels |" in capsys.readouterr().out
    assert "| V = 151,936 | dense, fp32 |" in linear.markdown(load(newest(linear.KIND))["cases"])


def test_kept_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kept.json"
    assert kept_head.main(["--smoke", "--save", str(path)]) == 0
    assert all(case["contestants"].keys() == kept_head.LABELS.keys() for case in load(path)["cases"].values())
    capsys.readouterr()
    assert kept_head.main(["--markdown", str(path)]) == 0
    assert "| kept columns, head frozen |" in capsys.readouterr().out
    sizes = kept_head.kept_sizes(2_048, 151_936).double()
    found = float(sizes.mean()), float(sizes.median()), float(sizes.quantile(0.99)), float((sizes == 1).double().mean())
    assert found == pytest.approx((8.0, 2.0, 82.0, 0.46), rel=0.02)


def test_the_page_of_hidden_states_has_the_committed_numbers() -> None:
    text = linear.PAGE.read_text()
    block = linear.page_block(committed(linear.KIND), committed(context.KIND), committed(kept_head.KIND))
    assert page.filled(text, block) == text, "python -m benchmarks.linear --write"


def test_both_sizes_are_in_the_block() -> None:
    measured = {"label": "", "median": 1.5, "beyond_gradients": None, "wrong": ""}
    cases = {f"{work}-bf16-151936": {"contestants": {"ours": measured}} for work in ("dense", "dense_1024")}
    about = {"cpu": "EPYC", "cores": 2, "date": "2026-11-26", "bf16_products_are": "by magic"}
    block = linear.page_block([{"machine": about, "cases": cases}], [])
    assert "on 2 cores of EPYC, by magic, 2026-11-26" in block
    assert "| gspo-kernels |  | 1.50 s |  |  |" in block
    assert "| 151,936 bf16 | 1.50 |  |  |  |" in block


def test_a_call_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library whose bf16 product crawls on a processor without bf16 units; others are timed all the same."""
    monkeypatch.setattr(linear, "CALL_SECONDS", 1)

    def crawling(problem: Problem) -> Run:
        def run() -> None:
            for _ in range(1_000):
                time.sleep(0.01)

        return run

    slow = Contestant("slow", "slow", crawling)
    monkeypatch.setattr(linear, "CONTESTANTS", (linear.OURS, slow))
    found = linear.measured(linear_smoke(DENSE, "fp32"), linear.SMOKE_ROUNDS)
    assert found["errors"] == {"slow": "TimeoutError: a call takes more than 1 s"}
    assert "ours" in found["contestants"]


def test_who_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "products_seconds", lambda dtype: (2e-11, 2e-9 if dtype == "bf16" else 2e-11, 2e-11))
    case = linear_case(DENSE, "bf16", 151_936)
    assert "in bf16 take 34 times as long as in fp32 here" in linear.too_slow(linear.PRODUCTS, case)
    assert not linear.too_slow(linear.OURS, case)
    assert not linear.too_slow(linear.PRODUCTS, linear_case(DENSE, "fp32", 151_936))
    assert not linear.too_slow(linear.PRODUCTS, linear_case(FORWARD, "bf16", 151_936))


def test_libraries_take_part_where_something_is_to_be_learned() -> None:
    eager = linear.BY_NAME["eager"]
    large, small, dense = (
        linear_case(w, "fp32", v) for w, v in ((INACTIVE, 151_936), (INACTIVE, 32_000), (DENSE, 151_936))
    )
    assert linear.left_out(eager, large) and not linear.left_out(eager, small) and not linear.left_out(eager, dense)
    assert not any(linear.left_out(linear.BY_NAME[name], large) for name in ("ours", "products"))
    sent = pickle.loads(pickle.dumps(dense))  # to the process of a case
    assert not linear.left_out(linear.BY_NAME["compile"], sent)


def test_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "context.json"
    assert context.main(["--smoke", "--save", str(path)]) == 0
    short, long, whole = load(path)["contexts"]
    assert short["length"] == long["length"] < whole["length"]
    assert "| 1 of 8,192 tokens | " in capsys.readouterr().out
    fair = {"sequences": 1, "length": 1_000, "beside": 50_000_000}
    assert not context.grows([fair, {**fair, "length": 100_000, "beside": 55_000_000}])
    assert context.grows([fair, {**fair, "length": 100_000, "beside": 66_000_000}])


def test_a_million_rows_fit_into_one_gpu() -> None:
    work = gpu_model.Work(gpu_model.Plan("", "recompute", trained=True), rows=1_048_576, width=4_096)
    assert 30e9 < work.estimate.peak + work.shape.operand_bytes < 60e9


def test_linear_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "precision.json"
    assert linear_precision.main(["--smoke", "--save", str(path)]) == 0
    (found,) = json.loads(path.read_text())["lengths"].values()
    assert found["truly_clipped"] > 0
    assert found["contestants"]["ours"]["wrong"] == 0
    assert found["contestants"]["ours"]["log_ratio_error"] < 1e-6 < found["contestants"]["eager"]["log_ratio_error"]
    capsys.readouterr()
    assert linear_precision.main(["--markdown"]) == 0  # of the committed results
    assert "| gspo-kernels | " in capsys.readouterr().out


def test_linear_tf32(capsys: pytest.CaptureFixture[str]) -> None:
    assert linear_tf32.main(["--smoke"]) == 0
    exact, *rounded = capsys.readouterr().out.splitlines()[2:]
    assert float(exact.split("|")[2]) < 1e-6 and len(rounded) == 2
    assert all(float(row.split("|")[2]) > 1e-4 for row in rounded)


def test_gpu_model(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/gpu.md has what the model predicts of this package; one product at a time it is near what was measured."""
    assert gpu_model.main([]) == 0
    assert capsys.readouterr().out in (REPOSITORY / "docs" / "gpu.md").read_text()
    for content in page.committed():
        speed, cases = gpu_model.Speed.of(content), content["linear"]["cases"]
        for plan in gpu_model.PLANS:
            if plan.measured:
                work, measured = gpu_model.Work(plan), cases[plan.measured]["contestants"]["ours"]
                assert 0.7 < work.seconds(speed) / measured["median"] < 1.03, plan
                assert 0.9 < work.estimate.peak / measured["extra_bytes"] < 1.15, plan


def test_gpu_kept_model(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/gpu.md has what it predicts: from logits a pass and little more, from hidden states a fraction."""
    assert gpu_kept_model.main() == 0
    assert capsys.readouterr().out in (REPOSITORY / "docs" / "gpu.md").read_text()
    for speed in map(gpu_model.Speed.of, page.committed()):
        for work in gpu_kept_model.WORKS:
            passes = work.seconds(speed) * speed.copy / (2 * work.rows * gpu_model.VOCAB)
            assert work.width or 1 < passes < 1.1
            assert work.seconds(speed) < work.seconds_without(speed)


def test_peers(capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--smoke", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = tuple(f"| {hard.title} |" for hard in peers.HARD.values())
    hard = [line.split(" | ") for line in lines if line.startswith(titles)]
    assert len(hard) == 2 * len(peers.HARD) - 1, "columns of -inf have no hidden states"
    assert {cells[1] for cells in hard} == {"right", "finite, no gradient from it"}


def test_the_page_of_peers_has_the_newest_numbers() -> None:
    page = peers.PAGE.read_text()
    assert page == peers.fill(page, load(newest("peers"))), "python -m benchmarks.peers --write fills in docs/peers.md"


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot.main([str(newest("cpu")), str(tmp_path / "plot.png")])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert "| loss and gradient | fp32 |" in capsys.readouterr().out


def test_host(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loss is timed, and no stub is left behind."""
    kernel = triton_stage_kernels.batch_kernel
    monkeypatch.setattr(sys, "argv", ["host", "--calls", "2", "--profile"])
    host.main()
    printed = capsys.readouterr().out
    assert all(printed.count(f"\n{name:<12}") == 2 for name in host.LOSSES)
    assert "function calls" in printed
    assert triton_stage_kernels.batch_kernel is kernel


# ---- the pages of GPUs


def test_the_pages_show_the_committed_results() -> None:
    for name, block in page.PAGES.items():
        text = (REPOSITORY / name).read_text()
        assert page.filled(text, block(page.committed())) == text, f"{name}: python -m benchmarks.gpu_page"
    assert page.MARKED.search((REPOSITORY / "docs" / "gpu.md").read_text())


def test_the_tables_have_what_was_measured() -> None:
    content = {
        "machine": {"gpu": "NVIDIA H100 80GB HBM3"},
        "cases": {
            "gspo-8192": {
                "contestants": {"copy": {"median": 0.00166}, "ours": {"median": 0.002727}},
                "logits_bytes": 8_192 * 151_936 * 2,
            }
        },
        "linear": {"cases": {}, "chunks": {"dense": {str(1 << 30): {"median": 0.05}}}},
    }
    text = page.tables([content])
    assert "| GSPO, off-policy | 7.47 | 2.49 / 2.65-2.8 | 1.74 / 1.87-2.0 | 2.727 (91%) |" in text
    assert text.count(page.UNMEASURED) > 10
    assert "| dense | 50.0 |" in text, "chunks are shown where the case itself was not measured"
    assert "| GSPO, off-policy | H100 | 2.73 (91%) |" in page.summary([content])
