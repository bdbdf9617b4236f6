"""What the command line knows of a command: a row of the table in `commands.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mae_et.cli.arguments import Arguments, parse
from mae_et.cli.output import print_results, split_json_flag

Start = Callable[[Arguments], None]


@dataclass(frozen=True)
class Command:
    """A command of `mae-et`, called with the arguments after its name."""

    name: str
    """A second word is the first argument: `bench node`."""
    run: Callable[[Any], dict[str, Any] | None]
    """Runs a config, or without one the arguments. Returns results to print; None if it prints
    them. The first line of its docstring is the command's help."""
    config: type[Any] | None = None
    """No module of a config imports PyTorch, so that mistakes are reported at once."""
    parse: Callable[["Command", Arguments], Any] = parse
    """Returns what `run` takes."""
    first: Literal["checkpoint", "run", "runs"] | None = None
    """What the first word may be instead of a flag: `knn RUN` scores a checkpoint, `pretrain RUN`
    resumes a run, and `compare RUN ...` takes several."""
    repeat: Callable[[Start, Arguments], None] | None = None
    """Starts the command once for each of several first words."""
    keys_of_others: Mapping[str, str] = field(default_factory=dict)
    """Keys of the config that have an effect on another command only, with its name."""
    branches: bool = False
    """Whether it takes `--branch-from`."""
    trains: bool = False
    """Whether it takes `--stop-after-step`, and writes the branch to a new folder."""
    distributed: bool = False
    """Whether torchrun may start it once for each GPU."""
    stopped: str = "the same command starts over"
    """What a signal leaves behind, and what the same command does next."""

    @property
    def about(self) -> str:
        """One line of help."""
        return (self.run.__doc__ or self.name).splitlines()[0]

    def __call__(self, arguments: Arguments) -> None:
        """Parse arguments, run the command and print its results."""
        if self.config is None:
            self.run(arguments)
        elif self.repeat is None:
            self._start(arguments)
        else:
            self.repeat(self._start, arguments)

    def _start(self, arguments: Arguments) -> None:
        as_json = False
        if not hasattr(self.config, "json"):  # others print their results themselves
            arguments, as_json = split_json_flag(arguments)
        results = self.run(self.parse(self, arguments))
        if results is not None:
            print_results(results, as_json)
