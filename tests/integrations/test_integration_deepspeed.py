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
from modes import DEFAULT_MODE, WHOLE
from trl_trainers import SYMBOLS, classes, history, save_model, trainer_of

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed"),
    pytest.mark.skipif(find_spec("peft") is None, reason="needs PEFT: pip install peft"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

RANKS, GROUP = 2, 8
LOGGED = ("loss", "grad_norm", "clip_ratio/region_mean")
BOUNDS = {"loss": 1e-6, "grad_norm": 1e-5, "clip_ratio/region_mean": 1e-6, "parameters": 1e-6}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {  # the stage of ZeRO, the model, options of `trained`
    **({"untied": (3, "qwen3", {})} if WHOLE else {}),
    "tied": (3, "tied", {"gradient_checkpointing": True}),
    "adapters, of the head too": (3, "qwen3", {"adapted": ("q_proj", "down_proj", "lm_head")}),
    "entropy": (3, "qwen3", {"entropy_coef": 0.1, "length": 6}),  # a mean of means: equal lengths make it one mean
    "stage 2": (2, "qwen3", {}),
}


def completions_of(prompts: list[list[int]], length: int | None) -> list[list[int]]:
    """One completion for each copy of a prompt, of `length` or 1 to 9 digits."""
    completions = []
    for i, prompt in enumerate(prompts):
        drawn = torch.Generator().manual_seed(1000 * sum(prompt) + i % GROUP)
        size = length or int(torch.randint(1, 10, (), generator=drawn))
        completions.append(torch.randint(3, len(SYMBOLS) - 2, (size,), generator=drawn).tolist())
    return completions


def trained(
    model: str,
    folder: Path,
    ranks: int,
    stage: int,
    adapted: tuple[str, ...] = (),
    length: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Four optimizer steps of two micro-batches, every other one off-policy.

    Args:
        stage: of ZeRO; 0: without DeepSpeed.
        adapted: layers that get LoRA, beside which nothing is trained.
        length: of all completions.
    """
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
    peft_config = LoraConfig(r=4, target_modules=list(adapted)) if adapted else None
    trainer = trainer_of(classes()[1], model, folder, peft_config=peft_config, **{**usual, **options})
    sample = trainer._generate_single_turn

    def generate(prompts: list[list[int]], *others: Any, **more: Any) -> tuple[list[list[int]], None]:
        sampled, _ = sample(prompts, *others, **more)
        assert len(sampled) == len(prompts)
        return completions_of(prompts, length), None

    trainer._generate_single_turn = generate
    start = copy_of(trainer.model)  # with ZeRO-3 no values
    logs = history(trainer)[:-1]
    head = trainer.model.get_output_embeddings().weight
    found = {
        "type": type(trainer.model_wrapped).__name__, "numel of the head": head.numel(),
        **{name: [log[name] for log in logs] for name in LOGGED},
    }  # fmt: skip
    if stage == 3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
            return {**found, "parameters": copy_of(trainer.model)}
    end = copy_of(trainer.model)
    return {**found, "parameters": end, "moved by": largest_difference(start, end)}


Parameters = dict[str, torch.Tensor]


def copy_of(model: Any) -> Parameters:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(a: Parameters, b: Parameters) -> float:
    assert a.keys() == b.keys()
    return max((x - b[name]).abs().max().item() for name, x in a.items())


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


def test_two_ranks(tmp_path: Path) -> None:
    for kind in ("qwen3", "tied"):
        save_model(tmp_path / kind, kind)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), __file__, str(tmp_path)]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    alone = dict[str, dict[str, Any]]()  # by one process: of each model and its options
    for name, (stage, kind, options) in CASES.items():
        key = f"{kind} {options}"
        if key not in alone:
            alone[key] = trained(str(tmp_path / kind), tmp_path, 1, 0, **options)
        expected = alone[key]
        assert max(expected["clip_ratio/region_mean"]) > 0.1, "every other step is off-policy"
        assert found[name]["type"] == "DeepSpeedEngine"
        assert (found[name]["numel of the head"] == 0) == (stage == 3), "with ZeRO-3 each rank holds a part elsewhere"
        apart = {n: max(abs(a - b) for a, b in zip(found[name][n], expected[n], strict=True)) for n in LOGGED}
        apart["parameters"] = largest_difference(found[name]["parameters"], expected["parameters"])
        print(f"{name}: differences {apart}; parameters moved by {expected['moved by']:.1e}")
        assert expected["moved by"] > 1e-3
        assert all(apart[n] <= bound for n, bound in BOUNDS.items()), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_ranks(Path(sys.argv[1]))
