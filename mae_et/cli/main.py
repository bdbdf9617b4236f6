"""The `mae-et` command.

Exit status: 0 on success, 2 for a user's mistake, 1 for a run that failed, 128 + signal for a run
that a signal stopped, 141 (SIGPIPE) where stdout is closed early (`| head`). Commands that end with
results print them last, as a table on a terminal and one line of JSON elsewhere.
"""

import multiprocessing
import os
import re
import select
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from signal import SIGPIPE
from typing import Any

from mae_et.cli.arguments import Arguments
from mae_et.cli.commands import COMMANDS, find
from mae_et.errors import Interrupted, RunFailed, Stopped, UserError, one_line
from mae_et.runtime.console import say
from mae_et.runtime.signals import stop_signals
from mae_et.runtime.system_errors import explain_system_errors
from mae_et.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    warnings.showwarning = _one_line_warning
    threading.excepthook = _quiet_system_errors
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    try:
        with stop_signals():
            try:
                status = run(given)
            except SystemExit as ended:  # a command's --help
                status = int(ended.code or 0)
            print(end="", flush=True)  # at exit, a failure would print a traceback
            return status
    except (UserError, RunFailed) as error:
        say(_sentence(error))
        return 2 if isinstance(error, UserError) else 1
    except OSError as error:  # a full disk, a folder that disappeared
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at exit
            return 128 + SIGPIPE
        say(re.sub(r"^\[Errno \d+\] ", "", _sentence(error)))
        return 1
    except (Interrupted, Stopped) as error:
        say(str(error))
        return 128 + error.signal
    except KeyboardInterrupt:
        say("stopped at once; checkpoints saved before are kept")
        return 130


def run(given: Arguments) -> int:
    """Run a command line and return its exit status.

    Raises:
        UserError: the command line, or something that it names, cannot be used.
        RunFailed: a run failed, or memory or the disk ran out.
        Interrupted: a signal stopped a run, which has saved its state.
    """
    if given in (["--version"], ["-V"]):
        print(f"mae-et {__version__}")
        return 0
    if not given or given[0] in {"-h", "--help"}:
        print(usage())
        return 0 if given else 2
    command, rest = find(given)
    name = command.name
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UserError("the current folder was deleted or replaced: cd into it again") from None
    ranks = os.environ.get("WORLD_SIZE", "1")
    # Some containers set WORLD_SIZE only.
    if ranks not in {"", "1"} and "RANK" in os.environ and not command.distributed:
        raise UserError(f"{name} runs in one process, and WORLD_SIZE is {ranks}: start it alone")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "RANK" not in os.environ and command.distributed:
        say(
            f"warning: srun started {tasks} tasks, which do not know of each other: use mae-et "
            "submit, or torchrun in one task a node"
        )
    if sys.platform == "linux":
        # Python 3.14's default, forkserver, would import PyTorch in each loader process.
        multiprocessing.set_start_method("fork", force=True)
    try:
        with explain_system_errors():
            command(rest)
    except Stopped as stopped:
        raise Stopped(stopped.signal, command.stopped) from None
    return 0


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{command.about}" for name, command in COMMANDS.items()]
    head = "usage: mae-et COMMAND [--config FILE_OR_NAME ...] [--key value ...]"
    tail = (
        "mae-et COMMAND --help lists a command's common keys, --help all every key.\n"
        "Results are a table on a terminal, and one line of JSON elsewhere or with --json;\n"
        "plan, bench node, configs, status and compare print a table elsewhere too.\n"
        "Exit status: 0 done; 2 a mistake in the command, a config or data; 1 the run\n"
        "failed; 75 it hung; 128 + N signal N stopped it. After 75 and 128 + N, the same\n"
        "command resumes."
    )
    return "\n".join([head, "", *lines, "", tail])


def _sentence(error: Exception) -> str:
    """Return an error's sentence, without the traceback of a loader worker before it."""
    text = str(error).strip()
    if text.startswith("Caught "):
        text = re.sub(r"^.*\n[\w.]+: ", "", text, flags=re.DOTALL)
    return text


def _stdout_is_closed() -> bool:
    """Return whether the reader of stdout is gone, and not that of another pipe."""
    stdout = select.poll()
    stdout.register(1, 0)  # no events: errors are always reported
    return bool(stdout.poll(0))


def _quiet_system_errors(error: threading.ExceptHookArgs) -> None:
    """Print a thread's traceback, except for system errors: TensorBoard's next call raises them."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def _one_line_warning(message: Any, *_: Any, **__: Any) -> None:
    say(f"warning: {one_line(message)}")


if __name__ == "__main__":
    sys.exit(main())
