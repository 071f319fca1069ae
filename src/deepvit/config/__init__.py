"""What was asked: settings and their types, the name of the run folder, where a number comes from."""

from pathlib import Path

CONF = Path(__file__).resolve().parent.parent / "conf"  # the YAML files: the one place of every default
