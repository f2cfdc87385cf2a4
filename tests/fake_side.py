"""Stands in for `bench/race_side.py` in tests: made times, and a log of who was timed when. Loads nothing.

Of a side's configuration, section `fake`: name, image_s, seed, luck (from process to process), noise; accident.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
from pathlib import Path


def say(content: dict) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


job = json.loads(sys.stdin.readline())
fake = job["node"]["options"]["config"]["fake"]
# The store's: what all processes of a race share.
folder = Path(job["inputs"][0]["folder"]).parent
with (folder / "log.txt").open("a") as log:
    log.write(f"start {fake['name']}\n")
starts = (folder / "log.txt").read_text().splitlines().count(f"start {fake['name']}")
generator = random.Random(1000 * fake["seed"] + starts)
speed = math.exp(fake["luck"] * generator.gauss(0, 1))
accident = fake.get("accident")
if accident == "mistake":
    say({"error": "dataset 'coco': not found. Give --data-root", "is_mistake": True})
    sys.exit(1)
environment = {"commit": fake.get("commit"), "python": "CPython 3.12.0", "process": {"device": "cpu"}}
environment["process"]["threads"] = {"intra_op": fake.get("threads", 1)}
images = fake.get("images", [11, 12, 13])
scopes = ["head", "total"] if fake.get("scopes") is None else fake["scopes"]
sizes = [[64, 64]] * len(images)
say({"ready": {"on_cpu": True, "images": images, "sizes": sizes, "scopes": scopes, "environment": environment}})
for count, line in enumerate(sys.stdin):
    image = json.loads(line)["image"]
    turn = folder / "turn"
    os.close(os.open(turn, os.O_CREAT | os.O_EXCL))  # fails where the other side is being timed
    with (folder / "log.txt").open("a") as log:
        log.write(f"time {fake['name']} {image}\n")
    turn.unlink()
    if accident == "crash" and count == 5:
        sys.exit("a bad thing")
    if accident == "kill" and count == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if accident == "error" and count == 5:
        say({"error": "RuntimeError: no kernel", "is_mistake": False})
        sys.exit(1)
    total = fake["image_s"] * (1 + image) * speed * math.exp(fake["noise"] * generator.gauss(0, 1))
    elapsed = {scope: total if scope == "total" else total / 2 for scope in scopes}
    say({"elapsed_s": elapsed, "contended": count % 10 == 3, "throttled": None})
