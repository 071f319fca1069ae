"""The floors of the house: imports go down only, files stay small, importing deepvit stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "deepvit"
FLOORS = {"errors": 0, "signature": 0, "ops": 1, "models": 2, "importers": 3, "data": 3, "engine": 3, "analysis": 4,
          "settings": 4, "build": 5, "training": 7, "evaluation": 8, "predict": 8, "model_card": 8, "export": 8,
          "replay": 8, "report": 8, "bench": 8, "launch": 4, "continuing": 6, "jobs": 9, "cli": 9, "run_folder_name": 0,
          "_timm_plugin": 9, "__init__": 9}
PEERS = {"engine", "data", "importers"}
PROGRAMS = {"__main__.py", "preview.py", "figures.py"}  # run as `python -m ...`: they may compose configs
FILES = sorted(path for path in SOURCE.rglob("*.py") if "conf" not in path.parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" if node.module == "deepvit" else node.module for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    home = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    for name in imports(path):
        if name.split(".")[0] in ("hydra", "omegaconf"):
            assert home in ("cli", "build"), f"{path} knows {name}"
        if not name.startswith("deepvit.") or path.name in PROGRAMS:
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
