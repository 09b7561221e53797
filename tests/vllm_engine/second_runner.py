"""Kept sets and routed experts, which vLLM's second model runner alone returns. Run as a program by its tests:

    python tests/vllm_engine/second_runner.py result.json

in an environment with `ENVIRONMENT`, for a process has one model runner. Its Triton kernels run in the interpreter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "examples"), str(HERE.parent / "support")]
ENVIRONMENT = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": f"{HERE / 'interpreter'}:{HERE.parents[1]}",
}
OPTIONS = {"return_sampling_mask": True, "enable_return_routed_experts": True, "enable_prefix_caching": True}
REQUESTS: dict[str, dict[str, Any]] = {  # the engine refuses requests without top_k
    "top_p": {"top_k": 34, "top_p": 0.8},
    "top_k": {"top_k": 5},
    "min_p": {"top_k": 34, "min_p": 0.1},
    "all": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 0.7},
    "min_tokens": {"top_k": 34, "min_tokens": 8},
    "allowed": {"top_k": 34, "allowed_token_ids": list(range(1, 20))},
}


def main(result: Path) -> None:
    import recorded
    from tiny import Tiny, check, difference, facts, generate, kept_lists, start_engine

    tiny = Tiny(experts=4)
    engine = start_engine(tiny, **OPTIONS)
    found = {}
    for name, request in REQUESTS.items():
        request = {"n": 2, "max_tokens": 8, "ignore_eos": True} | request
        outputs = generate(engine, tiny.prompts[:2], **request)
        rollouts, temperature = check(outputs), request.get("temperature", 1.0)
        assert rollouts.kept is not None and rollouts.routed_experts is not None
        found[name] = {
            "outputs": recorded.plain(outputs),
            "request": request,
            "facts": facts(tiny, rollouts, temperature),
            "difference": difference(tiny, rollouts, temperature),
            "unfiltered": difference(tiny, rollouts, temperature, filtered=False),
            "from_logits": tiny.sets(rollouts, **request) == kept_lists(rollouts.kept),
            "experts": same_experts(rollouts.routed_experts, tiny.experts(rollouts)),
        }
    result.write_text(json.dumps(found))


def same_experts(engine: Tensor, trainer: Tensor) -> bool:
    """As sets, where the engine has returned any: it has none of a response's last token."""
    returned = engine[:, 0, 0] >= 0
    return bool(returned.float().mean() > 0.8) and bool((engine.sort(-1).values == trainer)[returned].all())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
