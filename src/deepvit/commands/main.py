"""The `deepvit` command: one door to all programs, their parsers, and the place where an error becomes a sentence."""

import importlib
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import yaml

import deepvit
from deepvit.errors import BAD_INPUT, DONE, FAILED, STOPPED, Failure, UserError, did_you_mean, unusable
from deepvit.run.console import print_any_name, say

COMMANDS = {  # name -> (module:function, what it does)
    "train": ("cli:train", "train a model; the same command continues an interrupted run"),
    "eval": ("cli:evaluate", "evaluate checkpoints of any format"),
    "check": ("check:main", "decode every image of a data set and list those that cannot be used"),
    "report": ("report:main", "tables and figures of run folders, the paper's numbers beside them"),
    "figures": ("figures:main", "attention maps, rollout, similarity and Theta of a checkpoint"),
    "predict": ("figures:predict", "the most probable classes of images"),
    "export": ("export:main", "write a model as safetensors, timm, ONNX or in the published layout"),
    "average": ("export:average", "the average of a run's last weights"),
    "preview": ("preview:main", "an augmented batch as the model sees it"),
    "regime": ("preview:regime", "what attention does in each block before any training"),
    "replay": ("preview:replay", "repeat one batch of a run, module by module"),
    "bench": ("bench:main", "speed and memory against peers")}
USAGE = "usage: deepvit COMMAND ...\n\n" + "\n".join(
    f"  {name:8} {purpose}" for name, (_, purpose) in COMMANDS.items()) + "\n\nMore: `deepvit COMMAND --help`."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `deepvit COMMAND ...` and returns the exit code: 0 done, 1 failed, 2 bad input, 75 stopped on request."""
    print_any_name()
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "--version"):
        say(f"deepvit {deepvit.__version__}" if name == "--version" else USAGE)
        return DONE
    try:
        if name not in COMMANDS:
            raise UserError(f"There is no command '{name}'.{did_you_mean(name, COMMANDS)} "
                            f"The commands are: {', '.join(COMMANDS)}.")
        module, _, function = COMMANDS[name][0].partition(":")
        program = getattr(importlib.import_module(f"deepvit.commands.{module}"), function)
        return program([expanded(word) for word in rest])
    except UserError as error:
        return _end(BAD_INPUT, str(error))
    except Failure as error:
        return _end(FAILED, str(error))
    except KeyboardInterrupt:
        return _end(STOPPED, "Stopped on request (SIGINT).")
    except BrokenPipeError:  # the reader of a table has seen enough
        say("")
        return DONE
    except OSError as error:
        return _end(BAD_INPUT, str(unusable(error)))


def expanded(word: str) -> str:
    """`init=~/x` with the home folder for `~`, at the start of a word, of a value, or of each in a list."""
    return re.sub(r"""((?:^|[=,\[])\s*['"]?)~(?=[/'",\]]|$)""", lambda found: found[1] + str(Path.home()), word)


def _end(code: int, sentence: str) -> int:
    say(sentence, sys.stderr)
    return code


def parser_of(command: str) -> ArgumentParser:
    """A program's, whose help is in help.yaml and ends with the most common uses."""
    said = yaml.safe_load(Path(__file__).with_name("help.yaml").read_text())[command]
    width = max(map(len, said["examples"]))
    examples = "\n".join(f"  {use:{width}}  {purpose}" for use, purpose in said["examples"].items())
    return ArgumentParser(prog=f"deepvit {command}", description=said["about"], epilog=f"examples:\n{examples}",
                          formatter_class=RawDescriptionHelpFormatter)


def add_weights(parser: ArgumentParser) -> None:
    parser.add_argument("--weights", choices=["auto", "ema", "raw"], default="auto", help="auto: EMA if there is one")
