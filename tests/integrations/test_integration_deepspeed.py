"""GSPOTrainer under DeepSpeed: two ranks train as one process with the whole batch does.

Everything but the completions is real: these are a function of the prompt, as sampling depends on the number of ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modes import DEFAULT_MODE
from test_integration_trl import SYMBOLS, classes, history, save_model, trainer_of

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"),
    pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT: pip install peft"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
    pytest.mark.filterwarnings("ignore"),
]

RANKS, GROUP = 2, 8
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {  # the stage of ZeRO, the model, options
    "whole": (3, "qwen3", {}),
    "tied": (3, "tied", {"gradient_checkpointing": True}),
    "adapters": (3, "qwen3", {"lora": True}),
    "stage 2": (2, "qwen3", {}),
}


def completions_of(prompts: list[list[int]]) -> list[list[int]]:
    """One completion for each copy of a prompt, of 1 to 9 digits."""
    completions = []
    for i, prompt in enumerate(prompts):
        drawn = torch.Generator().manual_seed(1000 * sum(prompt) + i % GROUP)
        length = int(torch.randint(1, 10, (), generator=drawn))
        completions.append(torch.randint(3, len(SYMBOLS) - 2, (length,), generator=drawn).tolist())
    return completions


def trained(model: str, folder: Path, ranks: int, stage: int, lora: bool = False, **options: Any) -> dict[str, Any]:
    """Four optimizer steps of two micro-batches, every other one off-policy. `stage`: of ZeRO; 0: without DeepSpeed."""
    from peft import LoraConfig

    usual: dict[str, Any] = {
        "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4, "loss_type": "grpo",
        "beta": 0.05, "max_steps": 4, "num_iterations": 2, "per_device_train_batch_size": 2 * GROUP // ranks,
        "num_generations": GROUP, "max_grad_norm": 100.0,
    }  # fmt: skip
    if stage:  # ZeRO-3 leaves parameters whole if they are smaller than a threshold
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
        usual["deepspeed"] = {
            "zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        }  # fmt: skip
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"]) if lora else None
    trainer = trainer_of(classes()[1], model, folder, peft_config=peft_config, **{**usual, **options})
    sample = trainer._generate_single_turn

    def generate(prompts: list[list[int]], *others: Any, **more: Any) -> tuple[list[list[int]], None]:
        sampled, _ = sample(prompts, *others, **more)
        assert len(sampled) == len(prompts)
        return completions_of(prompts), None

    trainer._generate_single_turn = generate
    logs = history(trainer)[:-1]
    numbers = {name: [log[name] for log in logs] for name in ("loss", "grad_norm")}
    numbers["clipped"] = [log["clip_ratio/region_mean"] for log in logs]
    head = trainer.model.get_output_embeddings().weight
    found = {"type": type(trainer.model_wrapped).__name__, "numbers": numbers, "numel of the head": head.numel()}
    if stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            return {**found, "parameters": copy_of(trainer.model)}
    return {**found, "parameters": copy_of(trainer.model)}


def copy_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


def on_ranks(folder: Path) -> None:
    import deepspeed.comm.torch
    from accelerate.state import AcceleratorState

    deepspeed.comm.torch.build_shm_op = lambda: None  # gloo is enough; the operator would be compiled for a minute
    found = {}
    for name, (stage, kind, options) in CASES.items():
        found[name] = trained(str(folder / kind), folder, RANKS, stage, **options)
        AcceleratorState._reset_state()  # holds the configuration of DeepSpeed
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path, threads: None) -> None:
    torch.set_num_threads(1)
    for kind in ("qwen3", "tied"):
        save_model(tmp_path / kind, kind)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__, str(tmp_path)]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    for name, (stage, kind, options) in CASES.items():
        expected = trained(str(tmp_path / kind), tmp_path, 1, 0, **options)
        before = trained(str(tmp_path / kind), tmp_path, 1, 0, **{**options, "max_steps": 1, "learning_rate": 0.0})
        assert found[name]["type"] == "DeepSpeedEngine"
        assert (found[name]["numel of the head"] == 0) == (stage == 3), "ZeRO-3 holds a part of the head elsewhere"
        assert max(expected["numbers"]["clipped"]) > 0.1, "every other step is off-policy"
        for number, values in expected["numbers"].items():
            assert found[name]["numbers"][number] == pytest.approx(values, rel=1e-5, abs=1e-6), (name, number)
        parameters, others = expected["parameters"], found[name]["parameters"]
        assert others.keys() == parameters.keys()
        largest = max((p - before["parameters"][n]).abs().max() for n, p in parameters.items())
        worst = max((others[n] - p).abs().max() for n, p in parameters.items())
        print(f"{name}: parameters moved by {largest:.1e} and differ by {worst:.1e}")
        assert worst < 1e-5 * largest, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_ranks(Path(sys.argv[1]))
