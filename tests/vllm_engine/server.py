"""vLLM's HTTP server with the tiny model, and requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tiny import LONGEST, Tiny

OPTIONS = [
    "--dtype=float32", "--enforce-eager", f"--max-model-len={LONGEST}", "--block-size=32",
    "--num-gpu-blocks-override=128", "--logprobs-mode=processed_logprobs", "--no-enable-prefix-caching",
    "--enable-scale-out",  # /inference/v1/generate
]  # fmt: skip
START = 600  # seconds; on a busy machine the imports alone take minutes


class Server:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            return urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()}") from error

    def post(self, path: str, **body: Any) -> Any:
        """The parsed JSON of the response."""
        with self.open(path, {"model": "tiny", "seed": 0} | body) as response:
            return json.load(response)

    def stream(self, path: str, **body: Any) -> list[Any]:
        """The parsed chunks of the response."""
        with self.open(path, {"model": "tiny", "seed": 0, "stream": True} | body) as response:
            lines = [line.removeprefix("data: ") for line in response.read().decode().split("\n") if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    def is_up(self) -> bool:
        try:
            with self.open("/health", None):
                return True
        except (OSError, RuntimeError):
            return False

    def metric(self, name: str) -> float:
        with self.open("/metrics", None) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


@contextlib.contextmanager
def serve(tiny: Tiny, options: Sequence[str] = (), **environment: str) -> Iterator[Server]:
    """The server while the block runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        tiny.model.save_pretrained(folder)
        tiny.tokenizer.save_pretrained(folder)
        log = Path(folder, "log")
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        address = ["--served-model-name=tiny", "--host=127.0.0.1", f"--port={port}"]
        # In this mode the server has /pause, which aborts requests.
        variables = os.environ | {"VLLM_SERVER_DEV_MODE": "1"} | environment
        with log.open("w") as output:
            process = subprocess.Popen(
                [*module, *address, *OPTIONS, *options], env=variables, stdout=output, stderr=output
            )
        server, begin = Server(port), time.monotonic()
        try:
            while not server.is_up():
                if process.poll() is not None or time.monotonic() > begin + START:
                    raise RuntimeError("vLLM's server did not start:\n" + log.read_text()[-4000:])
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()
            process.wait(60)
