"""The floors of the house: imports go down only, files stay small, importing deepvit stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "deepvit"
FLOORS = {"errors": 0, "config": 1, "ops": 1, "models": 2, "importers": 3, "data": 3, "engine": 3, "analysis": 4,
          "report": 4, "run": 5, "bench": 5, "commands": 6}
PEERS = {"engine", "data", "importers"}
LOOSE = {"__init__", "__main__", "errors", "_timm_plugin"}  # the only modules in the package's root
FILES = sorted(path for path in SOURCE.rglob("*.py") if "conf" not in path.parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" if node.module == "deepvit" else node.module for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_no_module_lies_loose():
    assert {path.stem for path in FILES if path.parent == SOURCE} == LOOSE
    assert {path.relative_to(SOURCE).parts[0] for path in FILES if path.parent != SOURCE} == FLOORS.keys() - {"errors"}


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in LOOSE],
                         ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    home = path.relative_to(SOURCE).parts[0]
    for name in imports(path):
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert home in ("commands", "config"), f"{path} knows {name}"
        if not name.startswith("deepvit."):
            continue
        other = name.split(".")[1]
        assert FLOORS[other] <= FLOORS[home], f"{path} imports upward: {name}"
        assert other == home or not {home, other} <= PEERS, f"{path} knows its neighbour: {name}"


def test_files_stay_small():
    sizes = {path: len(path.read_text().splitlines()) for path in FILES}
    assert {str(path): lines for path, lines in sizes.items() if lines > 350} == {}


def test_import_is_light_and_registers_with_timm():
    program = ("import sys, deepvit; assert not {'torch', 'hydra', 'omegaconf', 'timm'} & set(sys.modules); "
               "import timm; assert timm.is_model('deepvit32') and 'hydra' not in sys.modules; "
               "assert timm.create_model('deepvit16', num_classes=7).num_classes == 7")
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
