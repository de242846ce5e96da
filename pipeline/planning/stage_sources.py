"""Which of the project's files the code of a stage consists of, and a digest of what they say.

Files are parsed and never executed. A file belongs to a stage when the module of its function imports it: directly or
through others, at the top of a file or inside a function. Code that imports torch also builds what tables name by a
text "lazypipe.module:Name", the classes of mechanisms; a report reads such a table and builds none of them. Only files
that compute results count (stages, model, kernels); what stands under `if TYPE_CHECKING:` is no import.

The digest is that of syntax trees without docstrings, comments and layout, so that rewording changes nothing.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from lazypipe.stages.contract import write_atomically

CACHE_FILE = "syntax_trees.json"
ROOMS = ("stages", "model", "kernels")  # the pipeline decides when and where, not what
NAMED = re.compile(r"lazypipe((?:\.\w+)+)(?::\w+)?")
TEXT, TORCH = "text:", "torch"  # before a name that a text mentions; among the names of a file that imports torch
NOT_CODE = frozenset({"ctx", "kind", "type_comment"})  # fields of a syntax tree that repeat others or say nothing


class SyntaxTrees:
    """What is known of files by their content: (digest of the syntax tree, modules that it names).

    Parsing all files takes most of a second, so <cache_dir>/syntax_trees.json keeps it; None keeps it in memory only.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._file = None if cache_dir is None else cache_dir / CACHE_FILE
        self._known: dict[str, tuple[str, list[str]]] = {}
        self._new = False
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self._file is not None:
                self._known = dict(json.loads(self._file.read_text(encoding="utf-8")))

    def read(self, path: Path) -> tuple[str, list[str]]:
        """(digest, sorted names below `lazypipe`, TORCH if it imports torch) of a file."""
        source = path.read_bytes()
        key = hashlib.sha256(source).hexdigest()
        if key not in self._known:
            self._known[key] = parsed(source)
            self._new = True
        return self._known[key]

    def save(self) -> None:
        """Write what is new; a directory that cannot be written costs the time next time."""
        if self._file is None or not self._new:
            return
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._file, json.dumps(self._known), durable=False)
        self._new = False


def stage_digest(package: Path, function: str, trees: SyntaxTrees) -> str:
    """sha256 (hex) over the code of a stage. package: the folder `lazypipe`. function: "module:function" of a row."""
    digest = hashlib.sha256()
    for path, (tree, _) in sorted(stage_files(package, function, trees).items()):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + tree.encode() + b"\0")
    return digest.hexdigest()


def stage_files(package: Path, function: str, trees: SyntaxTrees) -> dict[Path, tuple[str, list[str]]]:
    """The files of a stage's code with what `trees` says of them; `package` and `function` as in `stage_digest`."""
    module = function.partition(":")[0].removeprefix("lazypipe.")
    reached = _reached(package, module, trees, follow_texts=False)
    if any(TORCH in names for _, names in reached.values()):
        return _reached(package, module, trees, follow_texts=True)
    return reached


def _reached(package: Path, module: str, trees: SyntaxTrees, follow_texts: bool) -> dict[Path, tuple[str, list[str]]]:
    waiting = list(_files_of(package, module))
    reached: dict[Path, tuple[str, list[str]]] = {}
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached[path] = trees.read(path)
        for name in reached[path][1]:
            if follow_texts or not name.startswith(TEXT):
                waiting += _files_of(package, name.removeprefix(TEXT))
    return reached


def _files_of(package: Path, name: str) -> Iterator[Path]:
    """The file of a module 'stages.data.shards' and the __init__ files above it; nothing when it is no module."""
    parts = name.split(".")
    if parts[0] not in ROOMS:
        return
    for depth in range(1, len(parts) + 1):
        folder = package.joinpath(*parts[:depth])
        for path in (folder / "__init__.py", folder.with_suffix(".py")):
            if path.is_file():
                yield path


def parsed(source: bytes) -> tuple[str, list[str]]:
    """(digest of the syntax tree, names below `lazypipe` that it imports or mentions as modules), of Python source."""
    enabled = gc.isenabled()
    gc.disable()  # the collector doubles the time that a parser which makes many objects takes
    try:
        tree = ast.parse(source)
        parts: list[str] = []
        _write(tree, parts)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest(), sorted(set(_imported(tree)))
    finally:
        if enabled:
            gc.enable()


def _write(node: object, parts: list[str]) -> None:
    """Append a syntax tree without texts that stand alone (docstrings); empty fields are left out.

    Not `ast.dump`: that takes twice as long, and writes fields that a newer Python adds to every node.
    """
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return
    if isinstance(node, ast.AST):
        parts.append(type(node).__name__)
        if isinstance(node, ast.Constant):
            parts.append(repr(node.value))
            return
        for name in node._fields:
            value = getattr(node, name, None)
            if name not in NOT_CODE and value is not None and value != []:
                parts.append(name)
                _write(value, parts)
        parts.append(")")
    elif isinstance(node, list):
        parts.append("[")
        for item in node:
            _write(item, parts)
        parts.append("]")
    else:
        parts.append(repr(node))


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for statement in node.orelse:
            yield from _imported(statement)
        return
    if isinstance(node, ast.Import):
        yield from (TORCH for alias in node.names if alias.name.partition(".")[0] == TORCH)
        yield from (alias.name.removeprefix("lazypipe.") for alias in node.names if alias.name.startswith("lazypipe."))
    elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lazypipe."):
        module = (node.module or "").removeprefix("lazypipe.")
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)  # a name may be a module itself
    elif isinstance(node, ast.ImportFrom) and node.module == "lazypipe":
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        named = NAMED.fullmatch(node.value)
        if named is not None:
            yield TEXT + named[1].removeprefix(".")
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)
