"""How a program of this project ends, and the hint that goes with a misspelt word."""

import difflib
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DONE, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 75  # exit codes of every program


class UserError(Exception):
    """What the user gave is wrong: one sentence that names it and says what to do. Programs print it and exit 2."""

    def __str__(self) -> str:  # readable, however long the value that it quotes
        return re.sub(r"\S{1000,}", lambda word: f"{word[0][:100]}...", super().__str__())


class Untold(UserError):
    """A weights file does not tell a setting of its model: the sentence asks for it."""


class Failure(Exception):
    """Something broke that is not the user's input (a full disk, a lost rank). Programs print it and exit 1."""


def names_nothing(error: OSError) -> bool:
    """Whether it is no matter of a file or folder that the user could change: a full disk, a device that fails."""
    return error.filename is None and not isinstance(error, FileNotFoundError)


def unusable(error: OSError) -> UserError:
    """A file or folder of the user's that could not be opened, in a sentence; raises an error that names no file."""
    if isinstance(error, FileNotFoundError) and error.filename is None:  # of os.getcwd
        return UserError("The folder that this was started in is gone: change to another one.")
    if names_nothing(error):
        raise error
    return UserError(f"{error.filename} cannot be used ({error.strerror}): mend it or give another.")


@contextmanager
def writing(what: str, place: str | Path, advice: str) -> Iterator[None]:
    """An OSError inside as a `UserError`: `what` cannot be written to `place`, the reason, the advice."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written to {place} ({error.strerror or error}): {advice}.") from error


def first_line(error: BaseException) -> str:
    """Of a library's words; its name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def reason(error: Exception) -> str:
    """An error's kind and its first sentence, for a sentence of ours."""
    first = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0].rstrip(": .")
    return textwrap.shorten(first, 120, placeholder=" ...")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'depth'?"` for the nearest of `choices`, or an empty string where none is near."""
    near = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def choose(setting: str, name: str, choices: Mapping[str, Any]) -> Any:
    """`choices[name]`, or the sentence that names the setting and its choices."""
    if name not in list(choices):  # which may be asked for a list
        raise UserError(f"{setting}={name} is not known: choose from {', '.join(choices)}."
                        f"{did_you_mean(name, choices)}")
    return choices[name]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of them."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
