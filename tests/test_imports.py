"""The floors of the house: imports go down only, and what should be light to import is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "vision_peft"

# floor -> the floors it may import besides itself; the ground, that all stand on, is __init__.py and GROUND
GROUND = {"", "allocator", "errors", "user_cache", "processes"}
BELOW: dict[str, set[str]] = {
    "linalg": set(),
    "report": set(),
    "engine": {"linalg"},
    "adapters": {"engine", "linalg"},
    "optim": {"engine", "linalg"},
    "backbones": {"engine", "linalg"},
    "data": {"backbones", "engine", "linalg"},
    "generation": {"backbones", "engine", "linalg"},
    # a task maps its predictions back by what the data say
    "tasks": {"generation", "data", "backbones", "optim", "engine", "linalg", "report"},
    "quality": {"data", "backbones", "engine", "linalg"},
    "commands": {"quality", "generation", "data", "tasks", "report", "backbones", "adapters", "optim", "engine", "linalg"},
    "cli": {"commands"},
}
OF_ADAPTERS = {"vision_peft.engine.adapter", "vision_peft.engine.site", "vision_peft.linalg", "vision_peft.errors"}
# method_names() lists the files of the catalogue, inside a function and without importing any: the one look upwards
ALLOWED_UP = {("engine/adapter.py", "vision_peft.adapters")}
HEAVY_ENGINE = {"callback", "checkpoint"}  # the only files of engine that know lightning


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor(module: str) -> str:
    """`engine` for `vision_peft.engine.adapter`; "" for the package's own __init__, which stands on the ground."""
    return [*module.split("."), ""][1]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> list[str]:
    """Dotted names of every import in a file, inside functions too; `from a.b import c` gives a.b.c where that is a module, else a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                target = PACKAGE.parent / inner.replace(".", "/")
                found.append(inner if target.is_dir() or target.with_suffix(".py").is_file() else node.module)
    return found


def own(path: Path) -> list[str]:
    return [name for name in imported(path) if name.split(".")[0] == "vision_peft"]


def test_every_module_has_a_floor():
    known = {*BELOW, *GROUND}
    assert {floor(module_of(path)) for path in files()} <= known
    assert len(files()) > 60


@pytest.mark.parametrize("name", sorted({floor(module_of(path)) for path in files()} - {""}))
def test_imports_only_go_down(name):
    allowed = GROUND | {name} | BELOW.get(name, set())
    wrong = [
        f"{path.relative_to(PACKAGE)}: {each}"
        for path in files()
        if floor(module_of(path)) == name
        for each in own(path)
        if floor(each) not in allowed and (path.relative_to(PACKAGE).as_posix(), each) not in ALLOWED_UP
    ]
    assert not wrong


def test_the_floors_are_an_order():
    """No floor lies below itself, however long the way."""
    for name in BELOW:
        reached, new = set(), set(BELOW[name])
        while new:
            reached |= new
            new = {lower for each in new for lower in BELOW[each]} - reached
        assert name not in reached


def test_lightning_is_kept_out_of_the_engine_and_below():
    wrong = [
        f"{path.relative_to(PACKAGE)}: {each}"
        for path in files()
        if floor(module_of(path)) in {"linalg", "engine", "adapters", "optim", "backbones", "report", *GROUND}
        and not (path.parent.name == "engine" and path.stem in HEAVY_ENGINE)
        for each in imported(path)
        if each.split(".")[0] in {"lightning", "pytorch_lightning", "jsonargparse"}
    ]
    assert not wrong


def test_a_method_imports_the_contract_and_numerics_only():
    for path in sorted((PACKAGE / "adapters").glob("*.py")):
        for each in own(path):
            shared = each.startswith("vision_peft.adapters._")
            assert shared or any(each == name or each.startswith(f"{name}.") for name in OF_ADAPTERS), f"{path.name}: {each}"


def test_tasks_know_no_adapter_and_adapters_no_task():
    for path in sorted((PACKAGE / "tasks").glob("*.py")):
        for each in own(path):
            off = path.name == "base.py" and each == "vision_peft.engine.install"  # Task.frozen(): whatever is on the backbone is off
            assert off or not each.startswith(("vision_peft.adapters", "vision_peft.engine.install")), f"{path.name}: {each}"
    for path in [*(PACKAGE / "adapters").glob("*.py"), *(PACKAGE / "engine").glob("*.py")]:
        assert not [each for each in own(path) if floor(each) in ("tasks", "data", "backbones")], path.name


def test_the_scan_sees_an_import_that_goes_up(tmp_path):
    """Guards the tests above: inside a function, as a whole module, and by name."""
    file = tmp_path / "bad.py"
    lines = ["import vision_peft.tasks.base", "def f():", "    from vision_peft.engine import install", "    from vision_peft import data"]
    file.write_text("\n".join(lines))
    assert own(file) == ["vision_peft.tasks.base", "vision_peft.engine.install", "vision_peft.data"]


def test_the_one_look_upwards_is_inside_a_function():
    for file, module in ALLOWED_UP:
        tree = ast.parse((PACKAGE / file).read_text())
        assert module in own(PACKAGE / file), "no longer needed: take it off the list"
        assert not [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)) and module in ast.unparse(node)]


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import vision_peft", ("torch", "lightning", "timm", "numpy")),
        ("import vision_peft.cli", ("torch", "lightning", "timm", "numpy")),
        ("import vision_peft.cli; vision_peft.cli.main(['--help'])", ("torch", "lightning", "timm")),
        ("import vision_peft.data", ("torch", "lightning")),
        ("import vision_peft; vision_peft.attach", ("lightning", "timm", "open_clip")),
    ],
)
def test_light_imports(statement, absent):
    program = f"{statement}\nimport sys\nprint('loaded:', [name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded: []"
