"""The parsers of the commands: argparse's, whose help is in help.yaml and ends with the most common uses."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import yaml


def parser_of(command: str) -> ArgumentParser:
    said = yaml.safe_load(Path(__file__).with_name("help.yaml").read_text())[command]
    width = max(map(len, said["examples"]))
    examples = "\n".join(f"  {use:{width}}  {purpose}" for use, purpose in said["examples"].items())
    return ArgumentParser(prog=f"deepvit {command}", description=said["about"], epilog=f"examples:\n{examples}",
                          formatter_class=RawDescriptionHelpFormatter)


def add_weights(parser: ArgumentParser) -> None:
    parser.add_argument("--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA if there is one")
