"""`diffbench agree`: whether two runs found the same in the same images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.agreement import MATCH_PX, Agreement, compare_detections, judge, read_predictions
from bench.errors import BenchError
from bench.record import RunRecord, dump_json, load_record
from bench.store import Store, find_record, write_atomic

_SIDE = "a record's file, or its run id in --results"


def agree_command(
    base: Annotated[str, typer.Argument(metavar="BASE", help=_SIDE)],
    head: Annotated[str, typer.Argument(metavar="HEAD", help="the same, of another run")],
    results: Annotated[Path, typer.Option("--results", metavar="DIR", help="where run ids are looked for")] = Path(
        "results"
    ),
    max_box_px: Annotated[float, typer.Option(min=0, help="pixels that a box may be off")] = 1e-3,
    min_mask_iou: Annotated[float, typer.Option(min=0, max=1, help="of a mask and its twin")] = 0.999,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="keep what was found")] = None,
) -> None:
    """Pair the detections of two runs one by one: every one needs a twin of its class, with the same box and mask.

    Their predictions have to be in the results folders still. Exit codes: 0 all have one, 1 not within the limits.
    """
    if out is not None and out.suffix != ".json":
        raise BenchError(f"--out {out}: is not allowed. Allowed: a file name that ends in .json")
    sides = {name: _side(name, text, results) for name, text in (("base", base), ("head", head))}
    found = compare_detections(*(predictions for _, predictions in sides.values()))
    reasons = judge(found, max_box_px=max_box_px, min_mask_iou=min_mask_iou)
    if out is not None:
        runs = {name: {"suite": record.suite, "run_id": record.run_id} for name, (record, _) in sides.items()}
        limits = {"max_box_px": max_box_px, "min_mask_iou": min_mask_iou}
        write_atomic(out, dump_json({**runs, "limits": limits, "found": found.as_json(), "reasons": list(reasons)}))
        typer.echo(f"wrote {out}", err=True)
    for name, (record, _) in sides.items():
        typer.echo(f"{name}: {record.label}")
    typer.echo(agreement_text(found), nl=False)
    for reason in reasons:
        typer.echo(f"not the same: {reason}")
    if not reasons:
        typer.echo("the same, within the limits")
    raise typer.Exit(1 if reasons else 0)


def agreement_text(found: Agreement) -> str:
    """A line for each thing that was compared."""
    masks = f"{found.identical_masks} of {found.masks} identical, the others by at most {found.most_pixels} pixels"
    lines = [
        f"images      {found.images}",
        f"detections  {found.base} and {found.head}, {found.matched} of them twins (same class, box within "
        f"{MATCH_PX:g} px)",
        f"boxes       at most {found.largest_box_px:.2g} px apart",
        f"scores      at most {found.largest_score_difference:.2g} apart",
        f"masks       {masks}, IoU at least {found.smallest_mask_iou:.5f}",
    ]
    lines += [
        f"no twin     {side}: image {image_id}, category {category_id}, score {score:.4f}"
        for side, image_id, category_id, score in found.unmatched
    ]
    return "\n".join(lines) + "\n"


def _side(name: str, text: str, results: Path) -> tuple[RunRecord, Iterator[dict[str, Any]]]:
    """A record, and what was predicted."""
    path = find_record(name, text, results)
    record = load_record(path)
    if record.status != "ok" or "predict" not in record.nodes:
        why = record.status if record.status != "ok" else "nothing was predicted (`measure: score: false`)"
        raise BenchError(f"{path}: {why}, so there is nothing to compare. Run it again")
    predictions = read_predictions(Store(path.parents[2]).folder(record.nodes["predict"]))
    if predictions is None:
        raise BenchError(f"{path}: its predictions are not in {path.parents[2]}. Run its suite with these --results")
    return record, predictions
