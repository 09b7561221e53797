"""A Qwen3-MoE in vLLM: pushed weights reach its experts, by `Engine.push` and `GSPOTrainer`. Run by test_vllm_trl.py:

    python tests/vllm_engine/engine_with_experts.py folder

vLLM 0.32 reloads experts on a CPU without putting them into the layout of its kernels.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples"), str(HERE.parent / "support")]


def main(folder: Path) -> None:
    import torch
    from test_outputs import NOISE
    from test_vllm_trl import check_every_step
    from tiny import Tiny, check, difference, generate, start_engine

    own = Tiny(experts=8)
    engine = start_engine(own)
    for _ in range(2):
        with torch.no_grad():
            for weights in own.model.parameters():
                weights.mul_(1.1)
        stale = difference(own, check(generate(engine, own.prompts, n=4, max_tokens=24)))
        engine.push(own.model)
        pushed = difference(own, check(generate(engine, own.prompts, n=4, max_tokens=24)))
        assert pushed < NOISE < 1e-2 < stale, (pushed, stale)
    check_every_step(Tiny(experts=8, initializer_range=0.1), engine.llm, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
