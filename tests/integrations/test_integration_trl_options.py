"""GSPOTrainer's options: defaults, and what is refused by name."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
from modes import DEFAULT_MODE
from trl_trainers import Build, classes

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


def test_defaults_are_the_papers(build: Build) -> None:
    from gspo_kernels.integrations.trl import GSPOConfig

    _, cls = classes()
    ours = build(cls, config=GSPOConfig)
    assert (ours.importance_sampling_level, ours.loss_type, ours.beta) == ("sequence", "grpo", 0.0)
    assert (ours.epsilon_low, ours.epsilon_high) == (3e-4, 4e-4)
    given = [
        ({"epsilon": 1e-3}, (1e-3, 1e-3)),
        ({"epsilon_high": 5e-4}, (3e-4, 5e-4)),
        ({"epsilon": 1e-3, "epsilon_high": 2e-3}, (1e-3, 2e-3)),
        ({"importance_sampling_level": "sequence_token"}, (3e-4, 4e-4)),
        ({"importance_sampling_level": "token"}, (0.2, 0.27)),
    ]
    for options, expected in given:
        ours = build(cls, config=GSPOConfig, **options)
        assert (ours._objective.eps_low, ours._objective.eps_high) == expected


def test_a_range_that_never_clips_is_pointed_out(build: Build) -> None:
    _, cls = classes()
    with pytest.warns(UserWarning, match="epsilon"):
        build(cls, importance_sampling_level="sequence", loss_type="grpo")


REFUSED: dict[str, Any] = {
    "loss_type": "cispo", "importance_sampling_level": "turn", "delta": 1.1, "off_policy_mask_threshold": 0.5,
    "use_liger_kernel": True, "cast_lm_head_to_fp32": True, "torch_compile": True,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(build: Build, name: str) -> None:
    _, cls = classes()
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        build(cls, **{name: REFUSED[name]})


@pytest.mark.parametrize("loss_type", ["sapo", "luspo", "vespo"])
def test_refused_losses(build: Build, loss_type: str) -> None:
    _, cls = classes()
    with pytest.raises(ValueError, match=r"^loss_type: expected 'grpo' or"):
        build(cls, loss_type=loss_type)


@pytest.mark.parametrize("name", ["n_gpu", "fsdp_version"])
def test_refused_surroundings(name: str) -> None:
    from gspo_kernels.integrations.trl.trainer import check_surroundings

    def trainer(version: int = 2, gpus: int = 1) -> Any:
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
        return SimpleNamespace(
            args=SimpleNamespace(n_gpu=gpus), accelerator=SimpleNamespace(state=state), is_fsdp_enabled=True
        )

    check_surroundings(trainer())
    wrong = {"n_gpu": {"gpus": 2}, "fsdp_version": {"version": 1}}
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        check_surroundings(trainer(**wrong[name]))


# ---- versions of TRL


@dataclass
class AnyConfig:
    importance_sampling_level: str = "sequence"


def test_a_later_version_is_warned_about(build: Build) -> None:
    from trl import GRPOConfig, GRPOTrainer

    from gspo_kernels.integrations.trl.version import check_version

    for tested in ("1.14.0", "1.15.2", "1.16.0.dev0"):
        with warnings.catch_warnings(action="error"):
            check_version(tested, GRPOTrainer, GRPOConfig)
    with pytest.warns(UserWarning, match=r"^trl: .* was tested with 1.14 to 1.16; got 1.17.0.dev0"):
        check_version("1.17.0.dev0", GRPOTrainer, GRPOConfig)
    with pytest.raises(
        ImportError, match=r"^trl: expected 1.14 to 1.16, .* have delta, .*, router_aux_loss_coef; got 0.9.2"
    ):
        check_version("0.9.2", GRPOTrainer, AnyConfig)
