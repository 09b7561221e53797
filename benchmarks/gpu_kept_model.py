"""What a loss with kept sets should take on a GPU: python -m benchmarks.gpu_kept_model

A model, not a measurement: no GPU has run these kernels. Bytes move at the speed of the copy that a GPU has shown,
nothing overlaps, and a launch takes 3 microseconds on the device, which is what the 240 small kernels of a dense loss
took each. The host is left out: it needs 0.3 to 0.7 ms per loss. Sets are those that engines return: 8 columns a row on
average, 46% of the rows keep one, whose logit has no gradient. A table of docs/gpu.md is the output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .gpu_model import VOCAB, Plan, Speed, Work
from .gpu_page import committed
from .gpu_parts import table

COLUMNS, SINGLETONS = 8, 0.46
LAUNCH_SECONDS = 3e-6
SECTOR = 32  # bytes of memory that one logit takes to read, or one number to write
ID, OFFSET = 4, 8


@dataclass(frozen=True)
class KeptWork:
    """Of one GSPO loss and its gradient in bf16, every row with entries.

    launches: as tests/rows/test_launches.py counts them; `sort` counts six.
    """

    title: str
    launches: int
    rows: int = 8_192
    width: int = 0  # of hidden states; 0: from logits
    passes: int = 3  # from logits, without kept sets
    head: str = ""  # its gradient: "dense", "sparse" (rows of the columns that have entries), "" (frozen)

    @property
    def entries(self) -> int:
        return self.rows * COLUMNS

    def bytes_moved(self) -> float:
        numbers = self.rows * (OFFSET + 24)  # a row's statistics, and their gradients
        if not self.width:
            forward = self.entries * (ID + SECTOR)
            backward = self.entries * (2 * ID + 2 * SECTOR + 4)  # ids and the gradients by entry twice
            return 2 * numbers + forward + backward + 2 * self.rows * VOCAB
        row = 2 * self.width
        with_gradient = self.entries - SINGLETONS * self.rows
        forward = self.entries * (row + ID + 2 * OFFSET + 4) + self.rows * row
        of_rows = 2 * numbers + self.entries * (2 * ID + 3 * 4)
        of_hidden = with_gradient * (row + ID + 4) + self.rows * row
        # Sorted by id: about ten times over. At worst each entry is the only one of its column.
        of_head = with_gradient * 2 * row + self.entries * 10 * (ID + OFFSET) if self.head else 0.0
        zeros = {"": 0.0, "dense": VOCAB * row, "sparse": self.entries * row}[self.head]
        return forward + of_rows + of_hidden + of_head + zeros

    def seconds(self, speed: Speed) -> float:
        return self.bytes_moved() / speed.copy + self.launches * LAUNCH_SECONDS

    def seconds_without(self, speed: Speed) -> float:
        """Of the loss over all columns, by the same models."""
        if not self.width:
            return self.passes * 2 * self.rows * VOCAB / speed.copy
        return Work(Plan("", "single_pass", trained=bool(self.head)), self.rows, width=self.width).seconds(speed)


WORKS = (
    KeptWork("from logits, off-policy", 4),
    KeptWork("from logits, on-policy", 4, passes=2),
    *(
        KeptWork(f"hidden states, N = {rows:,}, D = {width:,}: {words}", launches, rows, width, head=head)
        for rows, width in ((2_048, 1_024), (8_192, 4_096))
        for words, launches, head in (
            ("dense gradient of the head", 24, "dense"),
            ("sparse gradient", 34, "sparse"),
            ("frozen", 16, ""),
        )
    ),
)


def predictions() -> str:
    speeds = [Speed.of(content) for content in committed()]

    def row(work: KeptWork) -> list[str]:
        cells = [work.title, f"{work.bytes_moved() / 1e9:.2f}", str(work.launches)]
        for speed in speeds:
            found, without = work.seconds(speed), work.seconds_without(speed)
            cells += [f"{found * 1e3:.2f}", f"{without * 1e3:.2f} ({without / found:.0f})"]
        return cells

    heads = ["predicted, never measured", "GB", "launches"]
    for speed in speeds:
        heads += [f"{speed.name}, ms", "all columns, ms (times)"]
    return "\n".join(table(heads, [row(work) for work in WORKS]))


def main(arguments: Sequence[str] = ()) -> int:
    print(predictions())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
