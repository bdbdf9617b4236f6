"""Check whether an existing output has the same settings, and its files may be overwritten."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.embedding.images import Part
from finetune.probing.frozen_encoder import FrozenEncoder
from finetune.provenance import digest_of_weights, inputs_of
from finetune.scoring_config import FrozenNetworkConfig
from mae_et.config.data import DataConfig
from mae_et.data.fingerprint import fingerprint_with_contents
from mae_et.errors import UserError
from mae_et.io.atomic import refuse_unwritable
from mae_et.io.plain_files import check_settings, read_mapping
from mae_et.runtime.console import say


def settings_of(
    config: FrozenNetworkConfig,
    output: Path,
    encoder: FrozenEncoder,
    data: DataConfig,
    parts: Sequence[Part],
    **own: Any,
) -> dict[str, Any]:
    """Return all settings that determine the bytes of a file, a command's `own` among them."""
    digest = digest_of_weights(encoder.network)
    return {
        "file": output.name,
        **inputs_of(digest, data, encoder.image_size, config),
        "images": {part.split: fingerprint_with_contents(part.source)[:16] for part in parts},
        **own,
        "batch_size": config.batch_size,
    }


def description_of(output: Path) -> Path:
    """Return the path of the JSON file that describes an output."""
    return output.with_suffix(".json")


def partial_folder(output: Path) -> Path:
    """Return the folder of a partial output."""
    return output.with_name(output.name + ".partial")


def is_finished(output: Path, settings: dict[str, Any]) -> bool:
    """Return whether an output is complete with these settings; refuse one with other settings."""
    if not output.exists():
        _check_companions(output)
        return False
    if not description_of(output).exists():
        raise UserError(f"output {output} exists, and mae-et did not write it")
    before = read_mapping(description_of(output))
    check_settings(before, settings, f"{output} has other contents")
    say(f"{output} is complete already")
    shutil.rmtree(partial_folder(output), ignore_errors=True)  # left by a process killed at the end
    return True


def _check_companions(output: Path) -> None:
    """Refuse to overwrite files of the same name that another program or output wrote."""
    about = description_of(output)
    with refuse_unwritable(f"output {output}"):
        resumes = (partial_folder(output) / "progress.json").exists()
    mine = about.exists() and read_mapping(about).get("file") == output.name
    for path in (about, output.with_suffix(".csv")):
        if path.exists() and not mine and not resumes:
            raise UserError(f"{path} exists, and would be overwritten: give another output")
