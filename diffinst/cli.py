"""diffinst train, evaluate, predict and init-, import- and export-weights: parse, call one function, print.

A user's mistake: one line, exit code 2.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from diffinst.config import RELEASED, SECTIONS, Config, frozen_at_random, section_of
from diffinst.errors import ConfigError, DataError, DiffInstError

if TYPE_CHECKING:
    import torch

    from diffinst.checkpoint import Checkpoint
    from diffinst.engine.predict import Medium
    from diffinst.model import DiffusionInst

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DiffusionInst: instance segmentation by denoising boxes.",
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one configuration field, e.g. sampling_steps=4"),
]
DataRootOption = Annotated[
    Path | None, typer.Option("--data-root", help="folder of data sets; default: $DIFFINST_DATASETS")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]
ForceOption = Annotated[bool, typer.Option("--force", help="replace what is there already")]
PresetOption = Annotated[
    Literal["fixed", "released"],
    typer.Option("--preset", help="how evaluate and predict sample by default: see DIFFERENCES.md"),
]
CheckpointArgument = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="model.safetensors of a training")]

_NOT_FIXED = ("sampler", "data")  # sections that a checkpoint leaves open
_OF_A_DATASET = (
    "train_annotations",
    "train_images",
    "val_annotations",
    "val_images",
    "train_image_ids",
    "val_image_ids",
    "annotation_format",
)


@app.command()
def train(
    config_file: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file with sections model, sampler, train, data")
    ],
    out: Annotated[
        Path, typer.Option("--out", help="folder of checkpoints and losses; the same command continues there")
    ],
    override: SetOption = None,
    data_root: DataRootOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Train a model; Ctrl-C saves a checkpoint, and the same command goes on from it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from diffinst.build import seeded_model
    from diffinst.data.coco import open_dataset
    from diffinst.engine.train import FINAL_NAME, TrainProgress
    from diffinst.engine.train import train as run_training

    config = read_config(config_file, override or [])
    dataset = open_dataset(config.data, "train", data_root)
    classes = {"num_classes": dataset.num_classes}
    if config.model.num_classes not in {None, dataset.num_classes}:
        raise ConfigError(
            f"{config_file}: model.num_classes is {config.model.num_classes}, but the data set has "
            f"{dataset.num_classes} classes. Leave it out"
        )
    if (warning := frozen_at_random(config.model)) is not None:
        typer.echo(f"diffinst: warning: {config_file}: model.freeze_at: {warning}", err=True)
    model = seeded_model(config.model.model_copy(update=classes), config.train.seed)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns) as bar, _interruptible() as stopped:
        task = bar.add_task("training", total=config.train.iterations, state="")

        def show(progress: TrainProgress) -> None:
            left = "" if progress.seconds_left is None else f", {_duration(progress.seconds_left)} left"
            state = f"loss {progress.total:.3f}, learning rate {progress.learning_rate:.2e}{left}"
            bar.update(task, completed=progress.iteration, state=state)

        path = run_training(
            model, dataset, config, out, device=_device(device), progress=show, stop=lambda: bool(stopped)
        )
    if path.name != FINAL_NAME:
        typer.echo(f"stopped; the same command goes on from {path}")
        raise typer.Exit(130)
    typer.echo(f"wrote {path}")


@app.command()
def evaluate(
    checkpoint: CheckpointArgument,
    out: Annotated[
        Path, typer.Option("--out", help="folder of predictions and metrics; the same command continues there")
    ],
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file of sampler and data settings; what it leaves out is the checkpoint's"),
    ] = None,
    override: SetOption = None,
    data_root: DataRootOption = None,
    device: DeviceOption = "auto",
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="processes that load images; default: the training's")
    ] = None,
) -> None:
    """Predict the validation split and score it: the COCO or LVIS numbers for boxes and masks."""
    from rich.progress import Progress

    from diffinst.checkpoint import replacing
    from diffinst.data import catalog
    from diffinst.data.coco import open_dataset
    from diffinst.engine.evaluate import predict_split
    from diffinst.evaluation.predictions import iter_predictions
    from diffinst.evaluation.scoring import score_split

    loaded = _load(checkpoint)
    base = loaded.config if config_file is None else overlaid_config(loaded.config, config_file)
    config = override_config(base, override or [], allowed=_NOT_FIXED)
    dataset = open_dataset(config.data, "val", data_root)
    if dataset.num_classes != loaded.config.model.num_classes:
        raise ConfigError(
            f"{checkpoint}: made for {loaded.config.model.num_classes} classes, but {dataset.annotations_path} has "
            f"{dataset.num_classes}. Choose the data set that it was trained on"
        )
    if loaded.class_names not in ((), dataset.class_names):
        known, listed = next(pair for pair in zip(loaded.class_names, dataset.class_names) if pair[0] != pair[1])
        raise ConfigError(
            f"{checkpoint}: made for other classes than {dataset.annotations_path} lists, e.g. {known!r} where that "
            f"has {listed!r}. Choose the data set that it was trained on"
        )
    # A folder per checkpoint, data and settings: a killed evaluation goes on, and no two are ever mixed.
    folder = out / f"predictions-{_identity(checkpoint, config)}"
    with Progress() as bar, _interruptible() as stopped:
        task = bar.add_task("validation images", total=len(dataset))
        done = predict_split(
            _model(loaded, device, use_ema=config.sampler.use_ema),
            dataset,
            config.sampler,
            folder,
            batch_size=config.data.eval_batch_size,
            device=_device(device),
            num_workers=config.train.num_workers if workers is None else workers,
            progress=lambda finished, total: bar.update(task, completed=finished, total=total),
            stop=lambda: bool(stopped),
        )
    if done < len(dataset):
        typer.echo(f"stopped after {done} of {len(dataset)} images; the same command goes on")
        raise typer.Exit(130)
    paths = catalog.resolve(config.data, "val", data_root)
    scores = score_split(config.data, paths.annotations, iter_predictions(folder), image_ids=dataset.image_ids)
    for name, value in scores.metrics.items():
        typer.echo(f"{name:12s} {f'{value:.4f}' if value is not None else f'not defined: {scores.reasons[name]}'}")
    try:
        with replacing(out / "metrics.json") as temporary:
            temporary.write_text(json.dumps(scores.as_dict(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}). Choose another folder with --out") from error
    typer.echo(f"wrote {out / 'metrics.json'}")


@app.command()
def predict(
    checkpoint: CheckpointArgument,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="photographs, videos, and folders of them")],
    out: Annotated[Path, typer.Option("--out", help="folder of the drawn files, with their detections beside them")],
    override: SetOption = None,
    draw_threshold: Annotated[
        float, typer.Option("--draw-threshold", min=0.0, max=1.0, help="lowest score that is drawn")
    ] = 0.3,
    force: ForceOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Draw boxes, masks, classes and scores on photographs and videos, and write all detections as COCO results.

    Ctrl-C ends after the picture at hand; a video that was not finished is shorter, and plays.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from diffinst.engine.predict import category_ids_of, find_media
    from diffinst.engine.predict import predict as run_prediction

    media = find_media(files)
    loaded = _load(checkpoint)
    config = override_config(loaded.config, override or [], allowed=_NOT_FIXED)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar, _interruptible() as stopped:
        photographs = bar.add_task("photographs", total=sum(not medium.is_video for medium in media))
        bar.update(photographs, visible=any(not medium.is_video for medium in media))
        videos = {medium: bar.add_task(medium.path.name, visible=False) for medium in media if medium.is_video}

        def show(medium: Medium, done: int, total: int | None) -> None:
            if medium.is_video:
                bar.update(videos[medium], completed=done, total=total, visible=True)
            else:
                bar.advance(photographs)

        done = run_prediction(
            _model(loaded, device, use_ema=config.sampler.use_ema),
            media,
            out,
            data=config.data,
            settings=config.sampler,
            class_names=loaded.class_names,
            category_ids=category_ids_of(loaded),
            draw_threshold=draw_threshold,
            force=force,
            report=show,
            stop=lambda: bool(stopped),
        )
    if done < len(media):
        typer.echo(f"stopped after {done} of {len(media)} files; what was done is in {out}")
        raise typer.Exit(130)
    typer.echo(f"drew {_counted(media)}; all detections are beside them in {out}")


def _counted(media: Sequence[Medium]) -> str:
    videos = sum(medium.is_video for medium in media)
    counts = {"photograph": len(media) - videos, "video": videos}
    return " and ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)


def read_config(path: Path, overrides: list[str]) -> Config:
    """The configuration of a YAML file with the sections model, sampler, train and data, each optional.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; names the file, the key and what is allowed.
    """
    content = _read_sections(path)
    return override_config(_validated({key: value or {} for key, value in content.items()}, str(path)), overrides)


def overlaid_config(config: Config, path: Path) -> Config:
    """A checkpoint's `config` with the fields of a YAML file over it, which may have the sections sampler and data.

    Raises:
        ConfigError: as `read_config`; or the file has a section that the checkpoint fixes.
    """
    content = config.model_dump(mode="json")
    for key, values in _read_sections(path).items():
        if key not in SECTIONS:
            raise ConfigError(f"{path}: {key}: unknown key.{_nearest(str(key), list(_NOT_FIXED))}")
        if key not in _NOT_FIXED:
            allowed = ", ".join(_NOT_FIXED)
            raise ConfigError(f"{path}: {key}: the checkpoint fixes it. Allowed are the sections {allowed}")
        if values is None:
            continue
        if not isinstance(values, dict):
            fields = ", ".join(SECTIONS[key].model_fields)
            raise ConfigError(f"{path}: {key}: {values!r} is not allowed. Allowed: a mapping with the fields {fields}")
        if key == "data" and values.get("dataset", content["data"]["dataset"]) != content["data"]["dataset"]:
            # What says where the checkpoint's own set lies, and which part of it, is not about another one.
            content["data"] = {name: value for name, value in content["data"].items() if name not in _OF_A_DATASET}
        content[key] |= values
    return _validated(content, str(path))


def _read_sections(path: Path) -> dict[Any, Any]:
    """What a YAML file has by section, not checked yet."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must be a mapping with the sections {', '.join(SECTIONS)}")
    return content


def override_config(config: Config, overrides: list[str], *, allowed: tuple[str, ...] = tuple(SECTIONS)) -> Config:
    """`config` with KEY=VALUE settings; a key is a field's name or 'section.field', a value is read as YAML.

    Raises:
        ConfigError: no '=' in it, an unknown field, one of a section that is not allowed here, or an impossible value.
    """
    import yaml

    content = config.model_dump(mode="json")
    for text in overrides:
        key, sign, value = text.partition("=")
        section, dot, field = key.strip().rpartition(".")
        section = section if dot else section_of(field) or ""
        if not sign:
            raise ConfigError(f"--set {text}: needs the form KEY=VALUE")
        if section not in SECTIONS or field not in SECTIONS[section].model_fields:
            names = [name for part in allowed for name in SECTIONS[part].model_fields]
            raise ConfigError(f"--set {key}: unknown field.{_nearest(field, names)}")
        if section not in allowed:
            raise ConfigError(f"--set {key}: the checkpoint fixes it. Allowed are fields of {', '.join(allowed)}")
        try:
            content[section][field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text}: not valid YAML: {' '.join(str(error).split())}") from error
    return _validated(content, "--set") if overrides else config


def _validated(content: dict[Any, Any], source: str) -> Config:
    from pydantic import ValidationError

    try:
        return Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            section = SECTIONS.get(str(first["loc"][0])) if len(first["loc"]) > 1 else None
            names = list(section.model_fields if section else SECTIONS)
            message = f"unknown key.{_nearest(str(first['loc'][-1]), names)}"
        elif isinstance(first["input"], str) and _is_number(first["input"]):
            message += f". YAML reads {first['input']} as text: write {float(first['input'])!r}"
        place = f"{place}: " if place else ""  # none where sections do not go together
        raise ConfigError(f"{source}: {place}{message.removeprefix('Value error, ')}") from error


def _nearest(name: str, allowed: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, allowed, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Allowed: {', '.join(allowed)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: not a device. Allowed: auto, cpu, cuda, cuda:1, ...") from error
    if device.type not in ("cpu", "cuda"):  # box arithmetic is in float64, which mps does not have
        raise ConfigError(f"--device {name}: not a device that can run it. Allowed: auto, cpu, cuda, cuda:1, ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices. Use cpu or auto")
    return device


def _load(path: Path) -> Checkpoint:
    from diffinst.checkpoint import load_checkpoint

    return load_checkpoint(path)


def _model(checkpoint: Checkpoint, device: str, *, use_ema: bool) -> DiffusionInst:
    from diffinst.build import require_device, restored_model

    require_device(checkpoint.config.model, _device(device))
    return restored_model(checkpoint, use_ema=use_ema).to(_device(device)).eval()


def _identity(checkpoint: Path, config: Config) -> str:
    """12 hex digits of what predictions depend on."""
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    # Neither the batch size nor the training data changes a prediction.
    data = config.data.model_dump_json(exclude={"eval_batch_size", "train_annotations", "train_images"})
    digest.update((config.sampler.model_dump_json() + data).encode())
    return digest.hexdigest()[:12]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM makes non-empty; the second Ctrl-C ends the program at once."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:  # noqa: ARG001 - the signature of a handler
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@app.command("init-weights")
def init_weights(
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="where the weights go")],
    override: SetOption = None,
    preset: PresetOption = "fixed",
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the random weights")] = 0,
    still: Annotated[
        bool, typer.Option("--still", help="boxes stay where they are drawn: what moves them is 0, and not random")
    ] = False,
    force: ForceOption = False,
) -> None:
    """Write the weights that a training starts from: enough to time a model, and to hold two programs side by side.

    Six random stages in a row move every box out of the picture, and no mask is left to time; so --still for that.
    """
    import torch

    from diffinst.build import build_model
    from diffinst.checkpoint import save_checkpoint

    _check_new_file(out, (".safetensors",), force=force)
    config = override_config(_validated(RELEASED if preset == "released" else {}, "--preset"), override or [])
    if config.model.num_classes is None:
        raise ConfigError("--set num_classes=K is missing: how many classes the model tells apart, 80 for COCO")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(config.model)
    if still:
        for name, parameter in model.box_head.named_parameters():
            if ".box_deltas." in name:
                torch.nn.init.zeros_(parameter)
    save_checkpoint(out, model=model.state_dict(), config=config, iteration=0)
    typer.echo(f"wrote {out}: {sum(value.numel() for value in model.parameters()):,} random parameters")


@app.command("import-weights")
def import_weights(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help=".pkl or .pth of DiffusionInst, DiffusionDet, a ResNet or a Swin")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE.safetensors", help="where the converted weights go")],
    override: SetOption = None,
    preset: PresetOption = "fixed",
    classes: Annotated[
        Path | None, typer.Option("--classes", help="names: a text file, one a line, or COCO or LVIS annotations")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Convert weights of the released code; nothing in the file is executed.

    A whole model gives a file for evaluate, predict and a suite's model.weights; a backbone one for backbone_weights.
    """
    from diffinst.weights.importing import import_weights as run_import

    _check_new_file(out, (".safetensors",), force=force, source=file)
    base = override_config(_validated(RELEASED if preset == "released" else {}, "--preset"), override or [])
    given = [text.partition("=")[0].strip().rpartition(".")[2] for text in override or []]
    names, category_ids = _classes(classes) if classes else ((), ())
    imported = run_import(file, out, base, given=given, class_names=names, category_ids=category_ids)
    count = sum(value.numel() for value in imported.weights.values())
    average = ", and their moving average" if imported.ema else ""
    typer.echo(f"wrote {out}: {imported.kind}, {len(imported.weights)} tensors of {count:,} numbers{average}")
    typer.echo(f"read off the shapes: {_listed(imported.settings)}")
    if imported.assumed:
        typer.echo(f"not in the file, so as released (--set changes them): {_listed(imported.assumed)}")
    if imported.filled:
        typer.echo(f"not in the file, so as they start: {', '.join(imported.filled)}")
    if imported.left_out:
        typer.echo(f"left out, computed or of no use here: {len(imported.left_out)} names, {imported.left_out[0]} ...")


@app.command("export-weights")
def export_weights(
    checkpoint: CheckpointArgument,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE.pth|.pkl", help="for torch.load, or as detectron2's model zoo has it")
    ],
    force: ForceOption = False,
) -> None:
    """Write a checkpoint's weights under the names of the released code."""
    from diffinst.weights.exporting import SUFFIXES
    from diffinst.weights.exporting import export_weights as run_export

    _check_new_file(out, SUFFIXES, force=force, source=checkpoint)
    typer.echo(f"wrote {out}: {run_export(checkpoint, out)} tensors")


def _check_new_file(out: Path, suffixes: tuple[str, ...], *, force: bool, source: Path | None = None) -> None:
    """Refuses to write where something is already, and formats that are not written."""
    if out.suffix not in suffixes:
        raise ConfigError(f"--out {out}: is not allowed. Allowed: a file name that ends in {' or '.join(suffixes)}")
    if out.exists() and (
        not force or out.is_dir() or (source is not None and source.exists() and out.samefile(source))
    ):
        raise ConfigError(f"--out {out}: is there already. Choose another name, or replace it with --force")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}. Make it first")


def _classes(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names in the order of the classes, and their ids, which a text does not tell.

    They are the lines of a text, or the categories of COCO or LVIS annotations by id.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            categories = sorted(json.loads(text)["categories"], key=lambda category: category["id"])
            names = tuple(str(category["name"]) for category in categories)
            return names, tuple(int(category["id"]) for category in categories)
    except OSError as error:
        raise ConfigError(f"--classes {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--classes {path}: has no list of categories with id and name") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip()), ()


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in values.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a mistake of the user is printed as one line and gives 2."""
    try:
        app(args=None if argv is None else list(argv), prog_name="diffinst")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except DiffInstError as error:
        typer.echo(f"diffinst: {' '.join(str(error).split())}", err=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
