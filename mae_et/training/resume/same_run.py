"""Refuse to resume a run folder under settings that would change its numbers."""

from collections.abc import Callable, Collection
from typing import Any

from mae_et.checkpoints.run_config import recorded_config
from mae_et.config.files import numeric_keys, with_absolute_roots
from mae_et.config.keys import marked_keys
from mae_et.config.probe import OnlineProbeConfig
from mae_et.config.schema import PretrainConfig, RunConfig
from mae_et.errors import UserError
from mae_et.io.plain_files import read_text
from mae_et.runtime.console import notify


def check_same_run(config: RunConfig, saved: dict[str, Any] | None, finished: bool) -> None:
    """Compare a config with the checkpoint's or, for a finished run, with config.yaml.

    A run with a checkpoint may find its data at another path (`check_same_data` compares the data).
    """
    folder = config.output.dir
    written = folder / "config.yaml"
    if saved is not None:
        text = saved["config"]
    elif finished and written.exists():
        text = read_text(written)
    else:
        return
    refusal = "holds a run of another command, or of another version of mae-et"
    try:
        written_config = recorded_config(text, type(config), folder, refusal)
    except UserError as error:
        raise UserError(f"{error}; give another output.dir") from None
    written_config, config = map(with_absolute_roots, (written_config, config))
    before, now = numeric_keys(written_config), numeric_keys(config)
    kind = type(config)
    may_differ = marked_keys(kind, "resume")
    if saved is not None:
        may_differ += marked_keys(kind, "move")
    branch = f"change it from there on: --branch-from {folder} --output.dir NEW"

    def advise(key: str) -> str:
        other = branch if key in marked_keys(kind, "branch") else "another output.dir"
        return f"give the earlier value, or {other}"

    refusal = f"{folder} holds a checkpoint of another run"
    check_same_settings(refusal, before, now, may_differ, advise)
    earlier, probe = _online_probe(written_config), _online_probe(config)
    # The interval too, because it changes how many images a probe can afford.
    if earlier and probe and earlier != probe:
        notify("keys of probe have changed: its later scores may be of other images")


def _online_probe(config: RunConfig) -> OnlineProbeConfig | None:
    """Return the `probe` section; None if the run has no probes."""
    if isinstance(config, PretrainConfig) and config.probe.every is not None:
        return config.probe
    return None


def check_same_settings(
    refusal: str,
    before: dict[str, Any],
    now: dict[str, Any],
    may_differ: Collection[str],
    advise: Callable[[str], str] = lambda _: "give the earlier value, or another output.dir",
) -> None:
    """Refuse settings that differ in a key not in `may_differ`.

    `refusal` begins the message, and what `advise` returns for the key ends it.
    """
    for key, old in before.items():
        if old != now[key] and key not in may_differ:
            raise UserError(f"{refusal}: {key} was {old!r} and is now {now[key]!r}; {advise(key)}")
