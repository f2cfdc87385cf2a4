"""Which code determines a result: digests of the definitions that a node runs, by following names. Loads no torch.

A node's function uses functions, classes and constants, which use others. What is reached so, and nothing else, is the
node's code: a changed constant of the losses belongs to trainings and to no data set. Each definition counts by its
syntax tree without positions, comments, docstrings and annotations of functions, so that writing alone changes nothing.

Names are followed statically and generously: a name that is mentioned is reached, whether or not that line runs. A
class counts whole, since its methods are called through values. Code of other packages counts by the text that imports
it; their versions are the environment's. Nothing follows a name inside a string: such roots are listed in `_ROOTS`.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SOURCE_ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "diffinst")
BODY = ""  # the name of a module's own statements

# Node kind -> the worker's function for it.
_ROOTS: dict[str, tuple[str, ...]] = {
    kind: (f"bench.worker:run_{kind}",)
    for kind in ("dataset", "train", "weights", "predict", "score", "latency", "training_step")
}
# Which samples a GPU throttled is a result; what asks the driver for it, on the way there, describes the machine.
for _timed in ("latency", "training_step"):
    _ROOTS[_timed] = (*_ROOTS[_timed], "bench.measure.disturbances:held_back")
# Engines in another interpreter start there by file name.
_PEER_ROOTS = {"detectron2": ("bench.peers.run_peer:run",), "original": ("bench.peers.run_peer:run",)}

# What a result does not depend on: how nodes become processes and records, what describes the machine, and the
# configuration's checks, since the resolved values are in the node's spec.
_NEVER = (
    *("bench.server", "bench.record", "bench.store", "bench.engines", "bench.errors"),
    *(
        f"bench.measure.{name}"
        for name in ("environment", "moments", "source", "packages", "cpu", "gpu", "determinism")
    ),
    *("bench.peers.environment", "diffinst.config", "diffinst.errors"),
)
_OURS = (
    *("diffinst.build", "diffinst.model", "diffinst.heads", "diffinst.diffusion", "diffinst.losses"),
    *("diffinst.matching", "diffinst.federated", "diffinst.engine.inference", "diffinst.engine.tta"),
)
_EXTERNAL = ("bench.external", "bench.peers")
# Engine -> modules that its nodes mention and never run.
_NOT_OF = {
    "diffinst": ("bench.torchvision_engine", *_EXTERNAL),
    "torchvision": (*_OURS, *_EXTERNAL),
    "detectron2": (*_OURS, "bench.torchvision_engine", "bench.peers.original"),
    "original": (*_OURS, "bench.torchvision_engine"),
}


# Of these, a model has one; a module that several need is in none of them.
_BACKBONES = {name: f"diffinst.backbones.{name}" for name in ("resnet", "swin", "efficientnet", "tiny")}
_READERS = {"shapes": ("diffinst.data.shapes",), "lvis": ("diffinst.data.lvis", "diffinst.data.lvis_dataset")}
_NEVER_TRUE = ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")


@dataclass(frozen=True)
class Code:
    """What a node runs. digest: 16 hex digits. parts: 'module:name' -> digest of the definition, sorted."""

    digest: str
    parts: Mapping[str, str]


@cache
def node_code(kind: str, engine: str = "diffinst", *, backbone: str = "", dataset: str = "") -> Code:
    """The code of a node of this program's source.

    Args:
        kind: of the node. engine: that the node runs. backbone: of our model; '' counts all of them. dataset: what
            reads the data, 'shapes', 'coco' or 'lvis'; '' counts all.
    """
    roots = _ROOTS[kind]
    if kind in ("train", "predict", "latency", "training_step"):
        roots = (*roots, *_PEER_ROOTS.get(engine, ()))
    left_out = (*_NEVER, *_NOT_OF[engine])
    # A data set is read, and predictions are scored, without looking at the engine.
    if kind in ("dataset", "score"):
        left_out = (*_NEVER, *_OURS, *_EXTERNAL, "bench.torchvision_engine")
    if engine == "diffinst" and backbone:
        own = next((module for name, module in _BACKBONES.items() if backbone.startswith(name)), None)
        left_out += tuple(module for module in _BACKBONES.values() if own is not None and module != own)
    if dataset:
        left_out += tuple(module for name, modules in _READERS.items() if name != dataset for module in modules)
    return _source().code(roots, left_out)


@cache
def _source() -> Source:
    return Source(SOURCE_ROOT, PACKAGES)


@dataclass(frozen=True)
class _Import:
    """What an imported name stands for: a member of a module, or the module itself (member None)."""

    module: str
    member: str | None


@dataclass
class _Definition:
    """text: canonical syntax. uses: dotted names that it mentions. imports: those made inside it, by bound name."""

    text: list[str] = field(default_factory=list)
    uses: set[tuple[str, ...]] = field(default_factory=set)
    imports: dict[str, _Import] = field(default_factory=dict)


@dataclass
class _Module:
    name: str
    is_package: bool
    definitions: dict[str, _Definition] = field(default_factory=dict)
    imports: dict[str, _Import] = field(default_factory=dict)


class Source:
    """The modules of some packages below a folder, parsed when they are first reached.

    Args:
        root: the folder that holds the packages. packages: whose modules are followed.
    """

    def __init__(self, root: Path, packages: Iterable[str]) -> None:
        self._root, self._packages = root, tuple(packages)
        self._modules: dict[str, _Module | None] = {}
        self._digests: dict[tuple[str, str], str] = {}

    def code(self, roots: Iterable[str], left_out: Iterable[str] = ()) -> Code:
        """All that is reached from `roots`.

        Args:
            roots: 'module:name', or 'module:' for all of a module.
            left_out: modules and packages that are not followed.
        Raises:
            KeyError: a root does not exist.
        """
        closed = tuple(left_out)
        waiting: list[tuple[str, str]] = []
        for text in roots:
            module, _, name = text.partition(":")
            found = self._module(module)
            if found is None or (name and name not in found.definitions):
                raise KeyError(text)
            waiting += [(module, name)] if name else [(module, other) for other in found.definitions]
        parts: dict[str, str] = {}
        seen: set[tuple[str, str]] = set()
        while waiting:
            key = waiting.pop()
            if key in seen:
                continue
            seen.add(key)
            module, name = key
            if any(module == other or module.startswith(f"{other}.") for other in closed):
                continue
            waiting += [(module, BODY), *((package, BODY) for package in _parents(module))] if name != BODY else []
            found = self._module(module)
            if found is None or name not in found.definitions:
                continue
            parts[f"{module}:{name}"] = self._digest(found, name)
            waiting += self._used(found, found.definitions[name])
        ordered = dict(sorted(parts.items()))
        text = "".join(f"{part} {digest}\n" for part, digest in ordered.items())
        return Code(hashlib.sha256(text.encode()).hexdigest()[:16], ordered)

    def _digest(self, module: _Module, name: str) -> str:
        key = (module.name, name)
        if key not in self._digests:
            definition = module.definitions[name]
            # What a name from outside stands for is part of what is written.
            outside = [
                f"{used[0]} = {bound.module}.{bound.member or ''}"
                for used in definition.uses
                if (bound := definition.imports.get(used[0]) or module.imports.get(used[0]))
                and not self._is_followed(bound.module)
            ]
            text = "\n".join([*definition.text, *sorted(set(outside))])
            self._digests[key] = hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._digests[key]

    def _used(self, module: _Module, definition: _Definition) -> Iterator[tuple[str, str]]:
        """Definitions that one mentions, as (module, name)."""
        for bound in definition.imports.values():
            if bound.member is None:
                yield bound.module, BODY  # an import runs the module
        for used in definition.uses:
            first, *rest = used
            if first not in definition.imports and first in module.definitions:
                yield module.name, first
            elif found := definition.imports.get(first) or module.imports.get(first):
                yield from self._resolve(found, rest)

    def _resolve(self, bound: _Import, rest: list[str]) -> Iterator[tuple[str, str]]:
        """What an imported name, followed by attributes, reaches."""
        module, names = bound.module, [*([bound.member] if bound.member else []), *rest]
        while True:
            if not self._is_followed(module):
                return
            if not names:  # the module as a value: anything of it may be used
                found = self._module(module)
                yield from ((module, name) for name in (found.definitions if found else ()))
                return
            found = self._module(module)
            name = names[0]
            if found is not None and name in found.definitions:
                yield module, name
                return
            if found is not None and name in found.imports:  # handed on by another module
                yield module, BODY
                inner = found.imports[name]
                module, names = inner.module, [*([inner.member] if inner.member else []), *names[1:]]
                continue
            if self._module(f"{module}.{name}") is None:
                yield module, BODY
                return
            module, names = f"{module}.{name}", names[1:]

    def _is_followed(self, module: str) -> bool:
        return module.split(".")[0] in self._packages

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            path = self._root.joinpath(*name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            is_module = self._is_followed(name) and file.is_file()
            self._modules[name] = _read_module(name, file) if is_module else None
        return self._modules[name]


def _parents(module: str) -> list[str]:
    names = module.split(".")
    return [".".join(names[:end]) for end in range(1, len(names))]


def _read_module(name: str, file: Path) -> _Module:
    module = _Module(name, is_package=file.name == "__init__.py")
    body = module.definitions.setdefault(BODY, _Definition())
    for statement in ast.parse(file.read_bytes(), filename=file.name).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            imports = dict(_imports_of(statement, module))
            module.imports |= imports
            if isinstance(statement, ast.Import):
                body.imports |= imports
            continue
        names = _defined_names(statement)
        for target in names:
            _add(module.definitions.setdefault(target, _Definition()), statement, module)
        if not names and not _is_inert(statement):
            _add(body, statement, module)
            module.imports |= body.imports
    return module


def _defined_names(statement: ast.stmt) -> list[str]:
    """Names that a top-level statement defines and does nothing else; none where it does more."""
    match statement:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [statement.name]
        case ast.Assign():
            targets = statement.targets
        case ast.AnnAssign() | ast.AugAssign():
            targets = [statement.target]
        case _:
            return []
    names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    is_plain = all(isinstance(target, ast.Name | ast.Tuple | ast.List) for target in targets)
    return names if is_plain else []


def _is_inert(statement: ast.stmt) -> bool:
    """Docstrings, what only a type checker looks at, and what runs only if the module is the program."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.If) and ast.unparse(statement.test) in _NEVER_TRUE


def _imports_of(statement: ast.Import | ast.ImportFrom, module: _Module) -> Iterator[tuple[str, _Import]]:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            if alias.asname:
                yield alias.asname, _Import(alias.name, None)
            else:  # `import a.b` binds `a` and runs `a.b`; the second is no name that could be mentioned
                yield alias.name.split(".")[0], _Import(alias.name.split(".")[0], None)
                yield alias.name, _Import(alias.name, None)
        return
    source = statement.module or ""
    if statement.level:
        names = module.name.split(".")
        kept = names[: len(names) - statement.level + module.is_package]
        source = ".".join([*kept, *([source] if source else [])])
    for alias in statement.names:
        yield alias.asname or alias.name, _Import(source, alias.name)


def _add(definition: _Definition, statement: ast.stmt, module: _Module) -> None:
    reader = _Reader(definition, module)
    definition.text.append(reader.text(statement))


class _Reader:
    """Writes syntax canonically, the same for every Python version, and notes what is mentioned on the way."""

    def __init__(self, definition: _Definition, module: _Module) -> None:
        self._definition, self._module = definition, module

    def text(self, node: Any) -> str:
        match node:
            case list():
                return f"[{','.join(map(self.text, node))}]"
            case ast.Import() | ast.ImportFrom():
                self._definition.imports.update(_imports_of(node, self._module))
                return self._fields(node)
            case ast.Attribute() | ast.Name():
                names = _dotted(node)
                if names is None:  # an attribute of a value
                    return self._fields(node)
                self._definition.uses.add(names)
                return f"Name({'.'.join(names)})"
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return self._fields(node, body=_without_docstring(node.body))
            case ast.AST():
                return self._fields(node)
            case _:
                return repr(node)

    def _fields(self, node: ast.AST, **replaced: Any) -> str:
        written = []
        for name, value in ast.iter_fields(node):
            value = replaced.get(name, value)
            # `ctx` follows from the place; what is empty is left out, as later versions of Python add fields.
            if value is None and not isinstance(node, ast.Constant) or value == [] or name in ("ctx", "type_comment"):
                continue
            is_annotation = name == "returns" or (name == "annotation" and isinstance(node, ast.arg))
            if is_annotation or (name == "kind" and isinstance(node, ast.Constant)):
                continue
            written.append(f"{name}={self.text(value)}")
        return f"{type(node).__name__}({','.join(written)})"


def _dotted(node: ast.expr) -> tuple[str, ...] | None:
    """('a', 'b', 'c') of `a.b.c`; None of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else None


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        return body[1:]
    return body
