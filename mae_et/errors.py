"""Errors that end a command, one class for each exit status, and checks that raise them."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from signal import Signals
from typing import Any, get_args


class UserError(ValueError):
    """An invalid command, config or input: one sentence for the user, exit status 2."""


class UnknownClasses(UserError):
    """A validation split has classes that the training split lacks."""


def require(condition: bool, sentence: str) -> None:
    """Raise `UserError` with a sentence unless a condition holds."""
    if not condition:
        raise UserError(sentence)


def require_choice(value: object, choices: Any, key: str) -> None:
    """Raise `UserError`, with a sentence that starts with `key`, unless a `Literal` has a value."""
    known = get_args(choices)
    require(value in known, f"{key} must be one of {', '.join(known)}, got {value!r}")


SEEDS = f"[0, {2**63})"
"""Seeds that the generators of both PyTorch and NumPy accept."""


def require_in(interval: str, config: object, *keys: str) -> None:
    """Raise `UserError` if a field of a config, or an item of it, lies outside an interval.

    None, the value of an unset field, passes.

    Args:
        interval: such as "(0, 1]" or "[0, inf)"; a round bracket excludes its end.
        config: the section of a config.
        keys: names of its fields, as shown in the sentence (`optim.base_lr`).
    """
    low, high = map(float, interval[1:-1].split(", "))
    requirement = {
        "(0, inf)": "be positive", "(0, inf]": "be positive", "[0, inf)": "not be negative",
    }.get(interval, f"lie in {interval}")  # fmt: skip
    for key in keys:
        value = getattr(config, key.rpartition(".")[2])
        for each in value if isinstance(value, tuple | list) else (value,):
            if each is not None:
                above = low <= each if interval.startswith("[") else low < each
                below = each <= high if interval.endswith("]") else each < high
                require(above and below, f"{key} must {requirement}, got {value}")


def require_png(path: Path, key: str) -> None:
    """Raise `UserError` unless the path of an image to write ends in .png."""
    require(Path(path).suffix.lower() == ".png", f"{key} must end in .png, got {path}")


def one_line(error: object) -> str:
    """Return the message of an error (without one, its type), or any other text, on one line."""
    text = " ".join(str(error).split())
    return type(error).__name__ if not text and isinstance(error, Exception) else text


def listed(names: Sequence[object], most: int = 5) -> str:
    """Return the first names, separated by commas, and an ellipsis if there are more."""
    return ", ".join([*map(str, names[:most]), *(["..."] if len(names) > most else [])])


def refuse_unknown_classes(present: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise `UnknownClasses` if a split ("the shards have") has a class that training lacks."""
    trained = set(known)
    unknown = sorted(set(present) - trained)
    if unknown:
        sentence = f"{where} classes that the training split lacks: {listed(unknown)}"
        alike = names_alike(trained.union(unknown))
        raise UnknownClasses(sentence + f" ({ALIKE}: {listed(alike)})" * bool(alike))


ALIKE = "names that differ only in case, spaces, leading zeros or Unicode form"


def names_alike(names: Iterable[str]) -> list[str]:
    """Return the names that people may take for the same one as another, sorted."""
    forms = {name: unicodedata.normalize("NFKC", name).strip().casefold() for name in names}
    count = Counter(form.lstrip("0") for form in forms.values())
    return sorted(name for name, form in forms.items() if count[form.lstrip("0")] > 1)


class RunFailed(RuntimeError):
    """A run that failed after a correct start: one sentence, exit status 1."""


class Unreadable(RunFailed):
    """An image that cannot be read; the sentence names its file."""


class Diverged(RunFailed):
    """A run whose loss or gradient became infinite or NaN; restarting it does not help."""


class PeerLost(RunFailed):
    """A rank that lost its connection to another rank, which failed."""


class Stopped(KeyboardInterrupt):
    """A signal that ended a command with nothing to save; exit status 128 + signal.

    Args:
        signal: number of the signal.
        kept: what is left behind, and what the same command does next.

    Attributes:
        signal: number of the signal.
        step: None, because no step was taken.
    """

    def __init__(self, signal: int, kept: str = "there was nothing to save"):
        super().__init__(f"stopped by {Signals(signal).name}; {kept}")
        self.step, self.signal = None, signal

    def __reduce__(self) -> tuple[type, tuple[int]]:  # to cross from a process of a pool
        return type(self), (self.signal,)


class Interrupted(RuntimeError):
    """A run that a signal stopped; its state is saved, and it can resume.

    Attributes:
        step: number of steps taken and saved.
        signal: number of the signal.
        folder: run folder.
    """

    def __init__(self, step: int, signal: int, folder: str):
        super().__init__(
            f"stopped by {Signals(signal).name} after step {step}, which is saved in {folder}; "
            "the same command resumes from there"
        )
        self.step, self.signal, self.folder = step, signal, folder

    def __reduce__(self) -> tuple[type, tuple[int, int, str]]:
        return type(self), (self.step, self.signal, self.folder)
