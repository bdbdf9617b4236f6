"""Refuse to go on in a run folder with other numbers than those of the run in it."""

from typing import Any

from mae_et.config_files import config_from_text, science
from mae_et.errors import UserError


def check_same_run(config: Any, saved: dict[str, Any] | None, finished: bool) -> None:
    """Compare a config with that of the folder's checkpoint (or, of a finished run, config.yaml).

    A run that goes on may find its data elsewhere, if there are as many (`check_same_data`); one
    that is finished is not trained again, so it must be asked for with the same data.

    Raises:
        UserError: a key that decides the numbers differs; the sentence names the first.
    """
    folder = config.output.folder
    written = folder / "config.yaml"
    if saved is not None:
        text = saved["config"]
    elif finished and written.exists():
        text = written.read_text(encoding="utf-8")
    else:
        return
    before, now = science(config_from_text(text, type(config))), science(config)
    # What is to be done about faults may be decided when they happen.
    may_differ = {"data.broken", "data.broken_share", "optim.skip_nonfinite"}
    may_differ |= {"data.download", "data.listing"} | (set() if finished else {"data.root"})
    for key, old in before.items():
        if old != now[key] and key not in may_differ:
            raise UserError(
                f"{folder} holds a checkpoint of another run: {key} was {old!r} and is now "
                f"{now[key]!r}; give another output.folder"
            )


def check_same_data(config: Any, saved: dict[str, Any] | None, images: int) -> None:
    """Compare the number of images with that of the folder's checkpoint.

    Raises:
        UserError: they differ.
    """
    if saved is not None and saved["plan"]["dataset_size"] != images:
        raise UserError(
            f"{config.output.folder} holds a checkpoint of another run: the data had "
            f"{saved['plan']['dataset_size']} images and now have {images}; give another "
            "output.folder"
        )
