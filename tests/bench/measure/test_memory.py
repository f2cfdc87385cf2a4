"""Peak memory, measured where it is known."""

from __future__ import annotations

import subprocess
import sys

from bench.measure.memory import peak_memory_bytes, reset_peak

PROGRAM = """
from bench.measure.memory import peak_memory_bytes
before = peak_memory_bytes("cpu")["rss"]
block = bytearray(200_000_000)
for start in range(0, len(block), 4096):
    block[start] = 1
del block
print(peak_memory_bytes("cpu")["rss"] - before)
"""


def test_the_peak_stays_after_the_memory_is_gone() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert 180_000_000 < int(done.stdout) < 260_000_000


def test_without_cuda_there_is_no_cuda_memory() -> None:
    reset_peak("cpu")
    peaks = peak_memory_bytes("cpu")
    assert peaks["cuda_allocated"] is peaks["cuda_reserved"] is None
    assert peaks["rss"] > 10_000_000
