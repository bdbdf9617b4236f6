"""Report that a run resumes with other code or libraries than those that saved its checkpoint."""

from typing import TYPE_CHECKING, Any

from mae_et.runtime.agreement import code_version
from mae_et.runtime.console import notify

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def code_of(config: "DataclassInstance") -> dict[str, str]:
    """Return versions and digests of the code that a command runs (`code_version`)."""
    return code_version(*sorted({"mae_et", type(config).__module__.partition(".")[0]}))


def report_other_code(saved: dict[str, Any] | None, now: dict[str, str]) -> None:
    """Print a line if a checkpoint was saved with other code, which may move later numbers."""
    if saved is None:
        return
    before = saved["origin"].get("code")
    if not isinstance(before, dict):
        other = "an earlier version of mae-et, which it does not record"
    elif changed := [name for name in now if before.get(name) != now[name]]:
        other = ", ".join(f"{name} {before.get(name)} (now {now[name]})" for name in changed)
    else:
        return
    notify(f"step {saved['step']:,} was saved with {other}: later numbers may move (CHANGELOG.md)")
