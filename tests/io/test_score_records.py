"""Records of scores, one for each combination of data, settings and weights."""

import json
from pathlib import Path

from mae_et.io.score_records import read_records, write_record


def record(knn: float, data: str = "a", **provenance: object) -> dict:
    return {"data": data, "knn": knn, "provenance": provenance}


def test_each_combination_of_data_settings_and_weights_has_its_latest_record(tmp_path) -> None:
    first, other = record(1.0, weights="x", version="1"), record(2.0, "b", weights="x")
    cls, retrained = first | {"settings": "pool=cls"}, record(4.0, weights="y")
    again = record(5.0, weights="x", version="2")
    counts = [write_record(tmp_path, each) for each in (first, other, cls, retrained, again)]
    assert counts == [0, 1, 2, 3, 3]
    assert json.loads((tmp_path / "results.json").read_text()) == again
    latest, *rest = read_records(tmp_path)
    assert latest == again
    assert all(each in rest for each in (other, cls, retrained))
    assert len(rest) == 3


def test_a_repeated_score_keeps_the_scores_that_it_lacks(tmp_path: Path) -> None:
    write_record(tmp_path, record(1.0) | {"untrained_knn": 0.5})
    write_record(tmp_path, record(1.5))
    assert read_records(tmp_path) == [record(1.5) | {"untrained_knn": 0.5}]


def test_the_record_of_an_earlier_version_is_kept_and_a_damaged_one_replaced(tmp_path) -> None:
    old = {"data": "a", "knn": 1.0}
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert read_records(tmp_path) == [old]
    write_record(tmp_path, record(2.0, "b"))
    assert read_records(tmp_path) == [record(2.0, "b"), old]
    (tmp_path / "results.json").write_text("{")
    write_record(tmp_path, record(3.0, "b"))
    assert read_records(tmp_path) == [record(3.0, "b"), old]


def test_data_are_the_same_by_any_path_to_a_folder_and_by_name_anywhere(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few").mkdir()
    assert write_record(tmp_path / "knn", record(1.0, "few")) == 0
    assert write_record(tmp_path / "knn", record(1.0, str(tmp_path / "few"))) == 0
    assert write_record(tmp_path / "knn", record(1.0, "cifar10")) == 1
    monkeypatch.chdir("few")
    assert write_record(tmp_path / "knn", record(1.0, "cifar10")) == 1
