"""GSPOTrainer on two ranks: DDP trains as with TRL; under FSDP2, gradients are the mean of the ranks'."""

from __future__ import annotations

import json
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
from trl_trainers import GRADIENT, LEVELS, LOSS, batch_of, classes, history, said, save_model, trainer_of

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,  # the trainers' and the model's own
    pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: pip install gspo-kernels[trl]"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]


FSDP2 = ("head with the rest", "head alone")


def on_ranks(folder: Path) -> None:
    """Under torchrun: DDP trains as with TRL; gradients under FSDP2 are the mean over the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = str(folder / "qwen3")
    options = {**LEVELS["sequence"], "loss_type": "grpo", "steps_per_generation": 4}
    trainers = [trainer_of(cls, model, folder, max_steps=4, **options) for cls in classes()]
    theirs, ours = ([log.get(name) for log in history(t) for name in ("loss", "entropy")] for t in trainers)
    parameters = [torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in trainers]
    say = {"type": type(trainers[1].model_wrapped).__name__, "theirs": theirs, "ours": ours}
    say["apart"] = (parameters[1] - parameters[0]).abs().max().item()

    inputs = batch_of(trainer_of(classes()[0], model, folder, **options))
    inputs["advantages"] = inputs["advantages"].roll(dist.get_rank())
    inputs["num_sequences_in_batch"] *= dist.get_world_size()
    mesh, (trl, gspo) = init_device_mesh("cpu", (dist.get_world_size(),)), classes()
    cases: list[tuple[Any, dict[str, Any], str]] = [(trl, options, ""), (gspo, options, "")]
    cases.append((gspo, {**options, "entropy_coef": 0.3}, ", entropy bonus"))  # multiplies again in the backward
    if find_spec("peft") is not None:
        from peft import LoraConfig

        lora = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "lm_head"])
        cases.append((gspo, {**options, "entropy_coef": 0.3, "peft_config": lora}, ", LoRA"))
    for cls, given, name in cases:
        whole = trainer_of(gspo if "peft_config" in given else trl, model, folder, **given)
        _, expected, _ = said(whole, inputs)
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        for wrapped in FSDP2:
            trainer = trainer_of(cls, model, folder, **given)
            trainer.model.load_state_dict(whole.model.state_dict())
            base = trainer.model.get_base_model() if "peft_config" in given else trainer.model
            for module in (*base.model.layers, *([base.lm_head] if wrapped == FSDP2[1] else [])):
                fully_shard(module, mesh=mesh)
            fully_shard(trainer.model, mesh=mesh)
            _, gradients, _ = said(trainer, inputs)
            worst = [(gradients[n].full_tensor() - g).abs().max() / g.abs().max() for n, g in expected.items()]
            say[f"{cls.__name__}, {wrapped}{name}"] = max(x.item() for x in worst)

    top = [trainer_of(cls, model, folder, **options, top_entropy_quantile=0.4) for cls in classes()]
    own = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    part = {name: x[own] if x.ndim else x / 2 for name, x in inputs.items()}  # half of the counts
    losses, of_ranks = zip(*((said(t, part)[0].item(), said(t, part)[1]["lm_head.weight"]) for t in top), strict=True)
    say["top tokens"] = {"losses": losses, "apart": (of_ranks[1] - of_ranks[0]).abs().max().item()}

    completions = inputs["completion_ids"].shape[1]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    for cls in classes():
        trainer, bf16 = trainer_of(cls, model, folder, **options), torch.bfloat16
        fully_shard(trainer.model, mesh=mesh, mp_policy=MixedPrecisionPolicy(bf16, bf16, bf16))  # as accelerate does
        with torch.no_grad():
            logprobs, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, completions)
        say[f"{cls.__name__}, digits lost"] = bool((logprobs.float() == logprobs.bfloat16().float()).all())
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(say))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_two_ranks(tmp_path: Path) -> None:
    save_model(tmp_path / "qwen3", "qwen3")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=1800, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    assert found["type"] == "DistributedDataParallel"
    assert found["ours"][:8] == pytest.approx(found["theirs"][:8], abs=1e-5)
    assert found["apart"] < 1e-6
    for wrapped in FSDP2:
        assert found[f"GSPOTrainer, {wrapped}"] < GRADIENT
        assert found[f"GSPOTrainer, {wrapped}, entropy bonus"] < GRADIENT
        assert found.get(f"GSPOTrainer, {wrapped}, LoRA", 0.0) < GRADIENT
    theirs, ours = found["top tokens"]["losses"]  # the quantile is that of both ranks
    assert ours == pytest.approx(theirs, abs=LOSS) and found["top tokens"]["apart"] < GRADIENT
    assert found["GRPOTrainer, head with the rest"] < GRADIENT
    assert found["GRPOTrainer, head alone"] > 0.1, "TRL's gradient of the head is that of one rank"
    assert found["GRPOTrainer, digits lost"] and not found["GSPOTrainer, digits lost"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_ranks(Path(sys.argv[1]))
