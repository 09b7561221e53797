"""Lets vLLM's second model runner start on a CPU: its Triton kernels run in Triton's interpreter.

vLLM asks for a Triton with a backend "cpu", which PyPI does not have. With this folder on PYTHONPATH Triton finds one,
which compiles nothing: TRITON_INTERPRET=1 must be set.
"""


def register() -> None:
    """Called by vLLM in each of its processes: top-k and top-p as a CPU without Triton computes them.

    The interpreter of Triton 3.9 does not run their kernel.
    """
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
