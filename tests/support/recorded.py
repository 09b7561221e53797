"""What a real engine returned, as JSON, and objects of the same shape made from it.

`make test-vllm ARGS=--record` writes tests/rollout/recorded/*.json with `plain`. The ordinary suite has no engine: it
reads the files with `rebuilt`, which gives each object the class name, the fields and the length that it had.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "rollout" / "recorded"
CLASS, LENGTH = "__class__", "__len__"
SCRUBBED = {"request_id", "id", "created", "model", "system_fingerprint"}  # they differ by run and by machine


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def plain(value: Any) -> Any:
    """`value` as what JSON can hold; objects become dicts of their fields and `CLASS`."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # an array of numpy
        return {CLASS: "ndarray", "dtype": str(value.dtype), "values": value.tolist()}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: scrubbed(key, each) for key, each in value.items()}
        return {CLASS: "dict", "items": [[key, plain(each)] for key, each in value.items()]}
    fields = fields_of(value)
    if fields is None:
        return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value
    found = {CLASS: type(value).__name__} | {key: scrubbed(key, each) for key, each in fields.items()}
    return found | ({LENGTH: len(value)} if hasattr(value, "__len__") else {})


def fields_of(value: Any) -> dict[str, Any] | None:
    """An object's fields by name; None for numbers, texts and lists."""
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    found = vars(value) | (getattr(value, "model_extra", None) or {})  # of pydantic: what the class does not name
    return {name: each for name, each in found.items() if not name.startswith("_")}


def scrubbed(name: str, value: Any) -> Any:
    if name in SCRUBBED and value is not None:
        return type(value)("1")
    return plain(value)


def rebuilt(value: Any) -> Any:
    """The reverse of `plain`, with objects of new classes."""
    if isinstance(value, list):
        return [rebuilt(each) for each in value]
    if not isinstance(value, dict):
        return value
    name = value.get(CLASS)
    if name is None:
        return {key: rebuilt(each) for key, each in value.items()}
    if name == "dict":
        return {key: rebuilt(each) for key, each in value["items"]}
    if name == "ndarray":
        import numpy as np

        return np.array(value["values"], dtype=value["dtype"])
    length = value.get(LENGTH)
    members = {} if length is None else {"__len__": lambda self: length}
    made = type(name, (), members)()
    vars(made).update({key: rebuilt(each) for key, each in value.items() if key not in (CLASS, LENGTH)})
    return made


def shapes(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every field of `value` as its path and the name of its type; `[]` stands for the places of a list or a dict."""
    if isinstance(value, list):
        for each in value:
            yield from shapes(each, f"{path}[]")
    elif isinstance(value, dict) and value.get(CLASS) == "dict":
        for _, each in value["items"]:
            yield from shapes(each, f"{path}[]")
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in (CLASS, LENGTH):
                name = "" if path.endswith("top_logprobs[]") else key  # its keys are tokens
                yield f"{path}.{name}", kind(each)
                yield from shapes(each, f"{path}.{name}")


def kind(value: Any) -> str:
    return value.get(CLASS, "dict") if isinstance(value, dict) else type(value).__name__


def dumps(record: dict[str, Any]) -> str:
    """One line for each key, and for each output."""
    lines = []
    for key, value in record.items():
        many = isinstance(value, list) and key == "outputs"
        text = ",\n  ".join(map(json.dumps, value)) if many else json.dumps(value)
        lines.append(f' "{key}": ' + (f"[\n  {text}\n ]" if many else text))
    return "{\n" + ",\n".join(lines) + "\n}\n"
