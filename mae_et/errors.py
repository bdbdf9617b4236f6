"""Errors that end a command, one class for each exit status."""

from signal import Signals


class UserError(ValueError):
    """A wrong command, config or input: one sentence for the user, exit status 2."""


def require(condition: bool, sentence: str) -> None:
    """Raise `UserError` with a sentence unless a condition holds."""
    if not condition:
        raise UserError(sentence)


class RunFailed(RuntimeError):
    """A run that failed after a correct start: one sentence, exit status 1."""


class Unreadable(RunFailed):
    """An image that cannot be read; the sentence names its file."""


class Diverged(RunFailed):
    """A run whose loss or gradient became infinite or NaN; restarting it does not help."""


class PeerLost(RunFailed):
    """A rank that lost its connection to another rank, which failed."""


class Stopped(KeyboardInterrupt):
    """A signal that ended a command while it had nothing to save; exit status 128 + signal.

    Attributes:
        signal: number of the signal.
        step: None, as no step was taken.
    """

    def __init__(self, signal: int):
        super().__init__(
            f"stopped by {Signals(signal).name}; there was nothing to save, and checkpoints saved "
            "before are kept"
        )
        self.step, self.signal = None, signal


class Interrupted(RuntimeError):
    """A run that a signal stopped; its state is saved, and it can resume.

    Attributes:
        step: number of steps taken and saved.
        signal: number of the signal.
    """

    def __init__(self, step: int, signal: int, folder: str):
        super().__init__(
            f"stopped by {Signals(signal).name} after step {step}, which is saved in {folder}; "
            "the same command resumes from there"
        )
        self.step, self.signal = step, signal
