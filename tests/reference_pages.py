"""Writes docs/settings.md from the YAML files of conf/ and their comments, and docs/api.md from the docstrings of the
public names: `python tests/reference_pages.py`."""

import importlib
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
SETTINGS, API = ROOT / "docs" / "settings.md", ROOT / "docs" / "api.md"
MODULES = ("deepvit", "deepvit.analysis", "deepvit.models", "deepvit.ops")
GROUPS = {  # group -> the file whose values are shown, and a file that has more of them
    "model": ("vit", None), "data": ("folder", "timm"), "augment": ("none", None), "optimizer": ("adamw", None),
    "schedule": ("cosine", None), "precision": ("fp32", None), "engine": ("default", None)}
START = """# All settings

Generated from the YAML files in `conf/` by `python tests/reference_pages.py`. Each is set as `name=value` on the
command line of `train.py`; `python train.py --cfg job` prints a run's values. A group is chosen as `group=name`, and
sets the values in its file.
"""


def read(path: Path) -> tuple[str, list[tuple[str, str, str]]]:
    """What a file says of itself in its first comments, and its settings: (name, value, remark).

    A setting's remark stands behind it and goes on in the lines below that hold nothing else. Those of a mapping have
    its name in front.
    """
    about, rows, parent = [], [], ""
    for line in path.read_text().splitlines():
        found = re.fullmatch(r"(\s*)([\w/]+):\s*([^#]*?)\s*(?:#\s*(.*))?", line)
        if line.startswith("# ") and not rows:
            about.append(line[2:])
        elif found and not line.startswith("-"):
            indent, name, value, remark = found.groups()
            parent = parent if indent else ""
            rows.append((f"{parent}{name}", value.strip("'\""), remark or ""))
            if not value and not indent:
                parent = f"{name}."
        elif rows and (more := re.fullmatch(r"\s+#\s*(.*)", line)):
            name, value, remark = rows[-1]
            rows[-1] = (name, value, f"{remark} {more[1]}".strip())
    about = [line for line in about if not line.startswith(("@package", "  python", "python", "  deepvit"))]
    return " ".join(about), rows


def settings_of(path: Path) -> list[tuple[str, str, str]]:
    """A file's settings alone, without what chooses other files and what is Hydra's."""
    left_out = ("defaults", "hydra") + (("name", "class") if path.parent.name == "attention" else ())
    return [row for row in read(path)[1] if row[0].split(".")[0] not in left_out
            and not any(other[0].startswith(f"{row[0]}.") for other in read(path)[1])]


def table(rows: list[tuple[str, str, str]], prefix: str = "") -> list[str]:
    lines = ["| setting | default | |", "|:--|:--|:--|"]
    for name, value, remark in rows:
        lines.append(f"| `{prefix}{name}` | `{value or repr(value)}` | {remark.replace(' | ', ', ')} |")
    return lines


def choices(folder: Path) -> list[str]:
    lines = ["| choice | |", "|:--|:--|"]
    return lines + [f"| `{path.stem}` | {read(path)[0]} |" for path in sorted(folder.glob("*.yaml"))]


def settings_page() -> str:
    parts = [START, "## The run", *table(settings_of(CONF / "train.yaml"))]
    for group, (base, more) in GROUPS.items():
        rows = settings_of(CONF / group / f"{base}.yaml")
        known = {name for name, _, _ in rows}
        rows += [row for row in settings_of(CONF / group / f"{more}.yaml") if row[0] not in known] if more else []
        parts += [f"\n## {group}\n", f"Values of `{group}={base}`.\n", *table(rows, f"{group}."), "",
                  f"Choices of `{group}=`:\n", *choices(CONF / group)]
    attentions, seen = [], set()
    for path in sorted((CONF / "model" / "attention").glob("*.yaml")):
        attentions += [row for row in settings_of(path) if row[0] not in seen]
        seen |= {row[0] for row in settings_of(path)}
    parts += ["\n## model/attention\n", *table(attentions, "model.attention."), "", "Choices of `model/attention=`:\n",
              *choices(CONF / "model" / "attention")]
    for group in ("recipe", "sweep"):
        parts += [f"\n## {group}\n", *choices(CONF / group)]
    parts += ["\n## eval.py\n", *table(settings_of(CONF / "eval.yaml"))]
    return "\n".join(parts) + "\n"


def api_page() -> str:
    parts = ["# Public names\n\nGenerated from the docstrings by `python tests/reference_pages.py`. What is not here\n"
             "may change without notice.\n"]
    seen = set()
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## {name}\n")
        for public in module.__all__:
            value = getattr(module, public)
            if (inspect.isfunction(value) or inspect.isclass(value)) and value not in seen:
                seen.add(value)
                parts += [f"### {name}.{public}\n", f"```python\n{public}{_signature(value)}\n```\n",
                          f"{_described(value)}\n"]
    return "\n".join([*parts, *measures()])


def measures() -> list[str]:
    """The registered measures of a probe, each with the first sentences of its function."""
    from deepvit.analysis.measures import MEASURES
    lines = ["## Measures of a probe\n", "| name | of | what | unit |", "|:--|:--|:--|:--|"]
    for one in MEASURES.values():
        about = " ".join(inspect.getdoc(one.function).split("\n\n")[0].split()).replace("|", "\\|")
        lines.append(f"| `{one.name}` | {', '.join(f'`{name}`' for name in one.takes)} | {about} | {one.unit} |")
    return [*lines, ""]


def _signature(value: type | Callable) -> str:
    try:
        signature = inspect.signature(value)
    except ValueError:
        return "(...)"
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    text = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return textwrap.fill(text, 116, subsequent_indent="    ", break_long_words=False)


def _described(value: type | Callable) -> str:
    """The docstring; lists of arguments and errors keep their lines."""
    text = re.sub(r"^(Args|Raises|Returns|Yields):\n((?:[ ]+.*\n?)+)",
                  lambda found: f"{found[1]}:\n```text\n{found[2].rstrip()}\n```\n", inspect.getdoc(value) or "",
                  flags=re.MULTILINE)
    return text.rstrip()


if __name__ == "__main__":
    SETTINGS.write_text(settings_page())
    API.write_text(api_page())
