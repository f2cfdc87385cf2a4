"""Installed packages: those that ours needs, for reading, and the lock of all that an interpreter finds."""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from functools import cache

DISTRIBUTION = "diffinst-bench"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed() -> dict[str, importlib.metadata.Distribution]:
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.name:  # a broken installation has none
            found.setdefault(_canonical(distribution.name), distribution)  # the first on the path is the one imported
    return found


@cache
def needed_packages() -> dict[str, str]:
    """Installed packages that ours needs, directly or not, with their versions; ours included."""
    installed = _installed()
    found: dict[str, str] = {}
    waiting = [DISTRIBUTION]
    while waiting:
        name = _canonical(waiting.pop())
        distribution = installed.get(name)
        if distribution is None or name in found:
            continue
        found[name] = distribution.version
        for requirement in distribution.requires or []:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            # Extras of others say nothing about us; our own count where they are installed.
            if match and ("extra ==" not in requirement or name == DISTRIBUTION):
                waiting.append(match[0])
    return dict(sorted(found.items()))


@cache
def packages_lock() -> str:
    """Every installed distribution but ours, a line each: 'numpy==2.4.6'; pip takes it as a file of constraints.

    Ours is left out: its code has an identity of its own, and a new version number of it is no other environment.
    """
    names = sorted((name, found.version or "unknown") for name, found in _installed().items() if name != DISTRIBUTION)
    return "".join(f"{name}=={version}\n" for name, version in names)


def lock_digest(lock: str) -> str:
    """SHA-256 of a lock."""
    return hashlib.sha256(lock.encode()).hexdigest()
