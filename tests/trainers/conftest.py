"""Tests inside the trainers themselves: `make test-trainers` runs them, in the environment that it makes for them."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("megatron") else ["test_*.py"]  # .venv-trainers alone has Megatron-Core
