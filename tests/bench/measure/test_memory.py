"""Peak memory, measured where it is known."""

from __future__ import annotations

import subprocess
import sys

import pytest

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


# The same work in a forked process, as nodes run, and in the process that the libraries were loaded in.
FORKED = """
import os
import sys
import torch
from bench.measure.memory import peak_memory_bytes, unmapped_library_bytes

def work():
    layer = torch.nn.Conv2d(3, 64, 3)
    with torch.no_grad():
        layer(torch.zeros(1, 3, 400, 400))
    return peak_memory_bytes("cpu")["rss"], unmapped_library_bytes()

torch.set_num_threads(1)
sys.stdout.flush()
child = os.fork()
if child == 0:
    print(*work(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(*work())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process holds of mapped files")
def test_a_forked_process_counts_the_libraries_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True)
    (forked, added), (whole, nothing) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert nothing == 0
    assert added > 50_000_000
    assert forked == pytest.approx(whole, rel=0.1)
    assert forked - added < 0.9 * whole
