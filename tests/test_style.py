# SPDX-License-Identifier: Apache-2.0
"""House rules that a program can check: direction of imports, size, names, traps.

ORDER is the map of architecture: a file may import what stands on an earlier line, or
its own line, never a later one.
"""

import ast
import functools
import os
import pathlib
import re
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

GROUND = ("dims", "mesh", "params", "rng", "config", "metrics", "one_row")
ORDER = [
    *[(name,) for name in ("data", "multitask", "curate", "quant", "models", "optim")],
    *[(name,) for name in ("plan", "fabric", "train", "graph", "rl", "eval")],
    *[(name,) for name in ("checkpoint", "fault", "serve", "platform")],
    ("report", "doctor", "pull"),
    # main and its neighbours, which may import everything above and each other
    (
        "experiment",
        "prepare",
        "checks",
        "export",
        "heldout",
        "session",
        "main",
        "dryrun",
    )
    + ("talk", "convert", "tools", "terminal", "serving", "evaluate", "planning"),
    ("bench",),  # measures whole runs too
    ("verbs",),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate([GROUND, *ORDER]) for name in names}
GROUND_ONLY = ("checkpoint", "fault")

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_MAIN_LINES = 150
NO_CONCEPT = re.compile(r"(^|_)(utils?|common|helpers?|misc|stuff)($|_)")
# names that read better alone: the words in which weights are declared
BY_NAME = {("qwen_jax.params", name) for name in ("Param", "normal", "ones", "zeros")}
BY_NAME.add(("qwen_jax", "__version__"))


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


PACKAGE = sources("qwen_jax")
PROGRAMS = sources("qwen_jax", "launch", "experiments")
ALL = sources("qwen_jax", "launch", "experiments", "tests")


@functools.cache
def tree_of(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
def nodes(path: pathlib.Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(tree_of(path)))


def place(path: pathlib.Path, node: ast.AST | int) -> str:
    line = node if isinstance(node, int) else getattr(node, "lineno", 0)
    return f"{path.relative_to(ROOT)}:{line}"


def report(found: list[str]) -> None:
    """All that breaks the rule at once: one run shows all there is to mend."""
    assert not found, "\n".join(["", *found])


# --- imports ---


def imported(path: pathlib.Path) -> list[tuple[int, str, list[str]]]:
    """(line, module, names) of each import of the package, lazy ones included."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            found.append((node.lineno, module, [alias.name for alias in node.names]))
    return [entry for entry in found if entry[1].split(".")[0] == "qwen_jax"]


def is_module(dotted: str) -> bool:
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def rooms_imported(path: pathlib.Path) -> list[tuple[int, str]]:
    """(line, room) where the room is a folder or file right below qwen_jax."""
    rooms = []
    for line, module, names in imported(path):
        parts = module.split(".")
        if len(parts) > 1:
            rooms.append((line, parts[1]))
        else:
            rooms += [(line, name) for name in names if name != "__version__"]
    return rooms


def test_imports_point_up_the_map():
    found = []
    for path in PACKAGE:
        room = path.relative_to(ROOT / "qwen_jax").parts[0].removesuffix(".py")
        if room == "__init__":
            found += [f"{place(path, n)}: imports {r}" for n, r in rooms_imported(path)]
            continue
        if room not in RANK:
            found.append(f"{room} has no place in ORDER: say where it stands")
            continue
        for line, other in rooms_imported(path):
            at = f"{place(path, line)}: {room} imports {other}"
            if other not in RANK:
                found.append(f"{at}, which has no place in ORDER")
            elif RANK[other] > RANK[room]:
                found.append(f"{at}, which stands below it")
            elif room in GROUND_ONLY and other not in (room, *GROUND):
                found.append(f"{at}; {room} sees the ground only")
    report(found)


def test_modules_are_imported_not_names():
    """`gspo.loss(...)` shows its home; a package's own __init__ may offer names."""
    report(
        [
            f"{place(path, line)}: import the module {module}, not {name}"
            for path in ALL
            if path.name != "__init__.py"
            for line, module, names in imported(path)
            for name in names
            if not is_module(f"{module}.{name}") and (module, name) not in BY_NAME
        ]
    )


# --- files ---


def test_files_open_with_their_licence_and_say_what_they_do():
    found = []
    for path in ALL:
        lines = [x for x in path.read_text().splitlines() if not x.startswith("#!")]
        if lines[:1] != ["# SPDX-License-Identifier: Apache-2.0"]:
            found.append(f"{place(path, 1)}: no SPDX line")
        if not ast.get_docstring(tree_of(path)):
            found.append(f"{place(path, 1)}: no docstring")
    report(found)


def test_files_are_named_after_a_concept():
    parts = {path: path.relative_to(ROOT).with_suffix("").parts for path in ALL}
    report([place(p, 0) for p in ALL if any(map(NO_CONCEPT.search, parts[p]))])


def test_files_and_functions_fit_in_a_head():
    found = []
    for path in ALL:
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_FILE_LINES:
            found.append(f"{place(path, 0)}: {num_lines} lines")
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                main = "main" in (node.name, path.stem)
                limit = MAX_MAIN_LINES if main else MAX_FUNCTION_LINES
                if length > limit:
                    found.append(f"{place(path, node)}: {node.name}, {length} lines")
    report(found)


# --- what is in them ---


def test_no_error_is_swallowed():
    found = []
    for path in PROGRAMS:
        for node in nodes(path):
            if isinstance(node, ast.ExceptHandler):
                if node.type is None:
                    found.append(f"{place(path, node)}: say what is caught")
                if all(isinstance(line, ast.Pass) for line in node.body):
                    found.append(f"{place(path, node)}: an error goes without a word")
    report(found)


def test_nothing_is_unpickled():
    """Such a file runs as code when it is read."""
    banned = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    found = []
    for path in PROGRAMS:
        for node in nodes(path):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                if not (isinstance(node.value, ast.Constant) and not node.value.value):
                    names = ["pickle"]
            if banned & {name.split(".")[0] for name in names}:
                found.append(f"{place(path, node)}: {', '.join(names)}")
    report(found)


def test_no_assert_checks_what_a_caller_gives():
    """`python -O` drops asserts, and a user deserves words: raise ValueError."""
    found = []
    for path in PACKAGE:
        for function in nodes(path):
            if not isinstance(function, ast.FunctionDef) or function.name[0] == "_":
                continue
            arguments = [*function.args.args, *function.args.kwonlyargs]
            given = {argument.arg for argument in arguments}
            for node in ast.walk(function):
                if isinstance(node, ast.Assert):
                    used = {
                        n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)
                    }
                    if used & given:
                        found.append(f"{place(path, node)}: {sorted(used & given)}")
    report(found)


def test_nothing_is_left_to_be_done():
    words = "|".join(
        ("TO" + "DO", "FIX" + "ME", "XX" + "X", "raise Not" + "ImplementedError")
    )
    pattern = re.compile(rf"\b({words})\b")
    report(
        [
            f"{place(path, number)}: {line.strip()}"
            for path in ALL
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if pattern.search(line)
        ]
    )


# --- what the command costs before it does anything ---

HEAVY = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "grain", "tensorstore")
HEAVY += ("tokenizers", "tiktoken", "ml_collections", "jinja2", "fsspec", "safetensors")


@pytest.mark.parametrize(
    "arguments",
    [["-c", "import qwen_jax"], ["-m", "qwen_jax", "--help"]],
    ids=["import qwen_jax", "qwen-jax --help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    modules = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert not [name for name in modules if name.split(".")[0] in HEAVY]


def test_help_answers_in_under_half_a_second():
    """By the processor's clock, which the machine's other work does not slow."""

    def used_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    tries = []
    for _ in range(3):
        before_s = used_s()
        subprocess.run(
            [sys.executable, "-m", "qwen_jax", "--help"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            env=dict(os.environ),
            check=True,
        )
        tries.append(used_s() - before_s)
    assert min(tries) < 0.5
