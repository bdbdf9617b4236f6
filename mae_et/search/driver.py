"""Search a curriculum: the spine.

config -> trials that are runs -> scores in a journal -> the best stages -> `curriculum.yaml`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mae_et.config.files import config_from_text, numeric_keys, to_yaml
from mae_et.data.datasets import open_dataset
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.search.bayes import bayes
from mae_et.search.config import SearchConfig
from mae_et.search.found import Found
from mae_et.search.greedy import greedy
from mae_et.search.journal import Journal
from mae_et.search.results import report
from mae_et.search.sequential import sequential
from mae_et.search.trials import Objective, Runner, Trials, run_here
from mae_et.training.resume import check_same_settings

Strategy = Callable[[SearchConfig, int, Trials], Found]
STRATEGIES: dict[str, Strategy] = {"sequential": sequential, "greedy": greedy, "bayes": bayes}
# What may change between two starts of one search.
MAY_DIFFER = {
    "data.root", "data.download", "data.listing", "curriculum.epochs", "search.trials",
    "search.cluster", "search.at_once", "search.keep_checkpoints",
}  # fmt: skip


def search(
    config: SearchConfig,
    objective: Objective,
    run: Runner = run_here,
    together: bool = False,
) -> dict[str, Any]:
    """Search a curriculum, going on from what the search folder holds.

    Args:
        config: the search.
        objective: from a run folder to what is to be high.
        run: trains runs; in this process by default.
        together: whether `run` is given all that do not wait for each other at once.

    Returns:
        What was found, which is also in the folder: `results.json`, `results.md`, `search.png`, and
        `curriculum.yaml`, which `mae-et pretrain --config` takes.

    Raises:
        UserError: the config, the data or the folder cannot be used.
        RunFailed: a run or the objective failed.
        Interrupted: a signal asked to stop; the same call goes on from there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("mae-et search is one process: give search.cluster to spread its trials")
    folder = config.output.dir
    images = len(open_dataset(config.data, "train", config.model.channels))
    with sole_writer(folder):
        check_same_search(config)
        write_text_atomically(folder / "config.yaml", to_yaml(config))
        journal = Journal(folder / "journal.jsonl")
        check_same_data(journal, folder, images)
        trials = Trials(journal, objective, run, together)
        found = STRATEGIES[config.search.strategy](config, images, trials)
        return report(config, images, found, journal)


def check_same_data(journal: Journal, folder: Path, images: int) -> None:
    """Note how many images there are; refuse to go on with another number of them.

    Raises:
        UserError: there are more, or fewer.
    """
    before = next((fact["images"] for fact in journal.facts if "images_of" in fact), None)
    if before is None:
        journal.note({"images_of": "train", "images": images})
    elif before != images:
        raise UserError(
            f"{folder} holds a search on {before} images, and there are now {images}; give another "
            "output.dir"
        )


def check_same_search(config: SearchConfig) -> None:
    """Refuse to go on in a folder with another search.

    Raises:
        UserError: a key that decides the numbers differs; the sentence names the first.
    """
    written = config.output.dir / "config.yaml"
    if not written.exists():
        return
    text = written.read_text(encoding="utf-8")
    before, now = numeric_keys(config_from_text(text, SearchConfig)), numeric_keys(config)
    # The trials' budget is curriculum.epochs where search.epochs is not given.
    for settings in (before, now):
        settings["search.epochs"] = settings["search.epochs"] or settings["curriculum.epochs"]
    check_same_settings(f"{config.output.dir} holds another search", before, now, MAY_DIFFER)
