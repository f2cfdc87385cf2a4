"""One hypothesis profile for all: the same examples each time, no deadline (machines are noisy)."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("fixed")
