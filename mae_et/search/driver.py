"""Search a curriculum: config -> trials (runs) -> scores in a log -> best stages -> config file."""

from collections.abc import Callable
from typing import Any

from mae_et.checkpoints.run_config import recorded_config
from mae_et.config.files import numeric_keys, to_yaml
from mae_et.config.keys import marked_keys
from mae_et.data.datasets import open_dataset
from mae_et.errors import UserError
from mae_et.io.atomic import write_text_atomically
from mae_et.io.lock import sole_writer
from mae_et.io.plain_files import keep_settings, read_text
from mae_et.search.config import SearchConfig
from mae_et.search.greedy import greedy
from mae_et.search.results import write_search_results
from mae_et.search.sequential import sequential
from mae_et.search.trial_log import TrialLog
from mae_et.search.trials import Objective, Runner, SearchResult, Trials, run_here
from mae_et.training.resume.same_run import check_same_settings

# Finds the best curriculum; the integer is the number of training images.
Strategy = Callable[[SearchConfig, int, Trials], SearchResult]


def search(
    config: SearchConfig,
    objective: Objective,
    run: Runner = run_here,
    parallel: bool = False,
) -> dict[str, Any]:
    """Search a curriculum, resuming from the search folder.

    The objective maps a run folder to the value to maximise. `run` trains runs, by default in this
    process; with `parallel`, all independent ones are passed in one call.

    Returns:
        The figures of `results.json`. The folder also has `results.md`, `search.png`, and
        `curriculum.yaml`, a config for `mae-et pretrain --config`.

    Raises:
        UserError: the config, the data or the folder is invalid.
        RunFailed: a run or the objective failed.
        Interrupted: a signal requested a stop; the same call resumes.
    """
    folder = config.output.dir
    images = len(open_dataset(config.data, "train", config.model.channels))
    with sole_writer(folder):
        check_same_search(config)
        write_text_atomically(folder / "config.yaml", to_yaml(config))
        refusal = f"{folder} holds another search"
        keep_settings(folder / "settings.json", {"images": images}, refusal)
        log = TrialLog(folder / "trials.jsonl")
        trials = Trials(log, objective, run, parallel)
        best = strategy_of(config)(config, images, trials)
        return write_search_results(config, images, best, log)


def strategy_of(config: SearchConfig) -> Strategy:
    """Return the strategy of a search."""
    if config.search.strategy != "bayes":
        return sequential if config.search.strategy == "sequential" else greedy
    try:
        from mae_et.search.bayes import bayes
    except ImportError as error:
        raise UserError(
            "search.strategy bayes needs the extra search: pip install '.[search]' (in the clone)"
        ) from error
    return bayes


def check_same_search(config: SearchConfig) -> None:
    """Refuse to resume in the folder of another search, or of a run."""
    folder = config.output.dir
    if (folder / "plan.json").exists():
        raise UserError(
            f"{folder} holds a run, whose config and results would be replaced; give another "
            "output.dir"
        )
    written = folder / "config.yaml"
    if not written.exists():
        return
    recorded = recorded_config(read_text(written), SearchConfig, written)
    before, now = numeric_keys(recorded), numeric_keys(config)
    # search.epochs defaults to curriculum.epochs.
    for settings in (before, now):
        settings["search.epochs"] = settings["search.epochs"] or settings["curriculum.epochs"]
    may_differ = marked_keys(SearchConfig, "resume", "move", "search")
    check_same_settings(f"{folder} holds another search", before, now, may_differ)
