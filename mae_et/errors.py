"""The ways in which a command ends early, told apart so that each gets its own exit status."""

from signal import Signals


class UserError(ValueError):
    """A wrong command, config or input: one sentence for the user, exit status 2."""


def require(condition: bool, sentence: str) -> None:
    """Refuse what does not hold.

    Raises:
        UserError: it does not, as the sentence says.
    """
    if not condition:
        raise UserError(sentence)


class RunFailed(RuntimeError):
    """A run that started rightly and could not go on: one sentence, exit status 1."""


class Unreadable(RunFailed):
    """An image that cannot be read; the sentence names it."""


class Diverged(RunFailed):
    """A run whose loss or gradient is not finite any more: starting it again does not help."""


class PeerLost(RunFailed):
    """A process whose connection to another broke: the other's end is the reason, not its own."""


class Interrupted(RuntimeError):
    """A run that was told to stop, saved its state and can go on.

    Attributes:
        step: steps done and saved.
        signal: number of the signal.
    """

    def __init__(self, step: int, signal: int, folder: str):
        super().__init__(
            f"stopped by {Signals(signal).name} after step {step}, which is saved in {folder}; "
            "the same command resumes from there"
        )
        self.step, self.signal = step, signal
