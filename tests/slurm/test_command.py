"""Commands that run as jobs."""

from pathlib import Path

from slurm.command import CommandLine, Task


def test_probes_run_on_one_rank_and_trainings_on_all(tmp_path: Path) -> None:
    kinds = {"knn": True, "compare": True, "pretrain": False, "evaluate": False}
    for kind, single in kinds.items():
        found = Task(CommandLine(lambda *_: None, print), kind, ["--a=1"], tmp_path, None)
        assert found.is_single is single
        assert found.words == [kind, "--a=1"]
