"""What a GPU run finds in carried/ is used where it works, and left out where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from . import gpu_carried as carried
from .gpu_parts import REPOSITORY


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is carried, and the package's own extension, are below a folder of the test's own."""
    monkeypatch.setattr(carried, "BUILD", tmp_path / "build")
    monkeypatch.setattr(carried, "WHEELS", tmp_path)
    monkeypatch.setattr(carried, "CACHE", tmp_path / "cache.tar")
    monkeypatch.setattr(carried, "SOURCES", tmp_path / "sources.sha256")
    monkeypatch.setattr(carried, "FOLDER", tmp_path)
    monkeypatch.setattr(carried, "installed", lambda: tmp_path / "package" / "_native.so")
    return tmp_path


def test_carried_wheels_are_on_the_path(folders: Path) -> None:
    assert carried._use_wheels({}) == "none"
    with zipfile.ZipFile(folders / "a_peer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer/__init__.py", "answer = 42\n")
        wheel.writestr("a_peer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: a-peer\nVersion: 1.0\n")
    environment = {**os.environ, "PYTHONPATH": "elsewhere"}
    assert carried._use_wheels(environment) == "a_peer-1.0"
    code = "import a_peer, importlib.metadata as m; print(a_peer.answer, m.version('a-peer'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "42 1.0\n"


def test_triton_cache_is_carried_to_another_folder(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after, path = folders / "before", folders / "after", carried.CACHE
    entry = before / "ABC"
    entry.mkdir(parents=True)
    (entry / "kernel.cubin").write_bytes(b"code")
    (entry / "__grp__kernel.json").write_text(
        json.dumps({"child_paths": {"kernel.cubin": str(entry / "kernel.cubin")}})
    )
    assert "1 entries" in carried.save_cache(before, path)
    environment = {"TRITON_CACHE_DIR": str(after)}
    assert carried._use_cache(environment) == "1 entries"
    group = json.loads((after / "ABC" / "__grp__kernel.json").read_text())
    assert Path(group["child_paths"]["kernel.cubin"]).read_bytes() == b"code"
    assert [p.name for p in after.iterdir()] == ["ABC"]
    monkeypatch.setattr(carried, "MOST_BYTES", 10)
    path.unlink()
    assert "not saved" in carried.save_cache(before, path) and not path.exists()


def test_what_is_carried_and_damaged_is_left_out(folders: Path) -> None:
    for name in ("peer-1.0-py3-none-any.whl", "cache.tar", "_native.so"):
        (folders / name).write_bytes(b"no such thing")
    found = carried.use({})
    assert found["wheels"].startswith("not used") and found["triton cache"].startswith("not used")
    assert "carried, does not load" in found["extension"] and "in place, not built" in found["extension"]
    assert not (folders / "package").exists()


def test_the_carried_extension_goes_before_an_older_one(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = carried.installed()
    target.parent.mkdir()
    target.write_bytes(b"old")
    (folders / "_native.so").write_bytes(b"new")
    monkeypatch.setattr(carried, "probe", lambda path: "")
    (folders / "sources.sha256").write_text("of other sources\n")
    assert "the sources have changed" in carried.use_extension() and target.read_bytes() == b"old"
    (folders / "sources.sha256").write_text(carried.sources() + "\n")
    assert carried.use_extension().startswith("carried") and target.read_bytes() == b"new"


# ---- a cache for a GPU that is elsewhere

WARM = """
import torch, gspo_kernels
from benchmarks import gpu_carried
gpu_carried.pretend(90)
logits = torch.zeros(1, 2, 32, dtype=torch.bfloat16)
gspo_kernels.token_logprobs(logits, torch.zeros(1, 2, dtype=torch.int64), backend="triton")
"""


def test_a_cache_is_made_without_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    subprocess.run([sys.executable, "-c", WARM], cwd=REPOSITORY, env=environment, check=True)
    (code,) = (tmp_path / "cache").rglob("forward_kernel.cubin")
    carried.save_cache(tmp_path / "cache", tmp_path / "cache.tar")
    assert carried.unpack_cache(tmp_path / "cache.tar", tmp_path) == 1
    assert (tmp_path / code.relative_to(tmp_path / "cache")).exists()
