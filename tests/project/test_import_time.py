"""`import gspo_kernels` brings no module but its own beyond those of `import torch`: what takes time comes when used.

Seconds depend on the machine, so modules are counted. The usual ways to break this: a decorator of `torch.compiler`
(it imports torch._dynamo, which takes a second), and an import of triton, numpy or transformers at the top of a module.

Measured on an idle Zen 4 core with Python 3.11 and torch 2.13: 0.10 s with the garbage collector off, of which a third
is torch's registration of 25 operators. With it on, 0.18 s: some thousand objects after `import torch`, whoever makes
them, start a collection of all of torch's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from modes import DEFAULT_MODE

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
sys.modules["numpy"] = None  # torch imports it where it is installed, and does without it elsewhere
import torch

class Watch:
    '''Finds nothing, and notes who imports what: the nearest module of this package among the callers.'''
    importers = {}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        frame = sys._getframe(1)
        while frame and not frame.f_globals.get("__name__", "").startswith("gspo_kernels"):
            frame = frame.f_back
        where = f"{frame.f_globals['__name__']}, line {frame.f_lineno}" if frame else "the program"
        cls.importers.setdefault(name, where)

def new():
    return {name: Watch.importers.get(name, "another module") for name in sys.modules
            if name not in before and name.partition(".")[0] != "gspo_kernels"}

torch.zeros(1, requires_grad=True).sum().backward()  # torch 2.15 imports modules of its own here
before = set(sys.modules)
sys.meta_path.insert(0, Watch)
import gspo_kernels
by_import = new()

from gspo_kernels import gspo_loss, token_logprobs
logits = torch.zeros(2, 3, 5, requires_grad=True)
token_ids = torch.zeros(2, 3, dtype=torch.int64)
old = token_logprobs(logits.detach(), token_ids).logprobs
gspo_loss(logits, token_ids, torch.ones(2), old).loss.backward()
print(json.dumps([by_import, new()]))
"""
# Modules of the standard library that a loss may bring and torch has not; nothing else.
LISTED: set[str] = set()


@DEFAULT_MODE
def test_import_brings_no_other_module() -> None:
    """Nor does the first loss from logits on a CPU."""
    found = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    for when, brought in zip(("the import", "the first loss"), json.loads(found.stdout), strict=True):
        more = [f"{name}, imported by {importer}" for name, importer in brought.items() if name not in LISTED]
        assert not more, f"{when} brings {len(more)} modules that torch does not, first:\n" + "\n".join(more[:5])
