from __future__ import annotations

from diffinst.ops.paths import forget_paths, note_path, paths_taken


def test_what_was_noted_since_it_was_forgotten() -> None:
    note_path("before", "a")
    forget_paths()
    assert paths_taken() == {}
    for operation, path in (("pooling", "bags"), ("linear", "torch"), ("pooling", "roi_align"), ("pooling", "bags")):
        note_path(operation, path)
    assert paths_taken() == {"linear": ["torch"], "pooling": ["bags", "roi_align"]}
