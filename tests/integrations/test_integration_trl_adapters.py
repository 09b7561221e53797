"""GSPOTrainer with PEFT: LoRA on the base or on the LM head, and whole copies of the head, against the model itself."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from modes import DEFAULT_MODE
from trl_trainers import LEVELS, Build, assert_equal, batch_of, classes, said

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT")
def test_adapters(build: Build) -> None:
    """LoRA: the head is frozen, and the reference is the model without adapters."""
    from peft import LoraConfig

    def lora(**options: Any) -> Any:
        return LoraConfig(r=4, init_lora_weights=False, **{"target_modules": ["q_proj", "down_proj"], **options})

    options = {**LEVELS["sequence"], "loss_type": "grpo", "beta": 0.1}
    trl, ours = (build(cls, peft_config=lora(), **options) for cls in classes())
    inputs = batch_of(trl)
    expected, found = said(trl, inputs), said(ours, inputs)
    assert all("lora" in name for name in found[1])
    assert_equal(expected, found)
