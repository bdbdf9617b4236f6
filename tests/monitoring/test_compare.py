"""The table of several runs."""

import csv
import json
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from mae_et.cli.main import main
from mae_et.config.commands import CompareConfig
from mae_et.errors import UserError
from mae_et.io.metrics_file import SCORES, row_line
from mae_et.io.score_records import write_record
from mae_et.monitoring.compare import NOTE, compare
from mae_et.monitoring.report.records import read_runs
from mae_et.monitoring.tables import markdown_table


def written(folder: Path, config: dict, **results: float) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def cells(table: str) -> list[dict[str, str]]:
    lines = table.split("\n\n")[0].split("\n")  # without the note
    head, _, *rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    strip = [[cell.strip("| ") for cell in row] for row in (head, *rows)]
    return [dict(zip(strip[0], row, strict=True)) for row in strip[1:]]


def test_columns_are_aligned_and_numbers_are_right_aligned() -> None:
    lines = markdown_table(["run", "loss"], [["a", "0.5"], ["a|b\nc", "12.25"]]).split("\n")
    assert lines == [
        "| run    |  loss |",
        "| ------ | ----: |",
        "| a      |   0.5 |",
        "| a\\|b c | 12.25 |",
    ]


def test_runs_that_differ_in_the_seed_alone_get_mean_and_deviation(tmp_path: Path) -> None:
    losses = {"a": (0.5, 0.7, 0.6), "b": (0.9,)}
    runs = [
        written(tmp_path / f"{name}{seed}", {"optim": {"base_lr": rate}, "seed": seed}, loss=loss)
        for (name, values), rate in zip(losses.items(), (1e-3, 1e-4), strict=True)
        for seed, loss in enumerate(values)
    ]
    rows = cells(compare(CompareConfig(runs)))
    assert [row["run"] for row in rows[:4]] == ["a0", "a1", "a2", "b0"]
    (average,) = rows[4:]
    assert average["run"] == "mean of 3 seeds: a0 ..."
    assert average["optim.base_lr"] == "0.001"
    assert average["seed"] == ""
    expected = mean(losses["a"]), stdev(losses["a"])
    assert [float(x) for x in average["loss"].split(" ± ")] == pytest.approx(expected)
    assert compare(CompareConfig(runs)).endswith(f"|\n\n{NOTE}")
    assert NOTE not in compare(CompareConfig(runs[:1]))


def test_an_unfinished_run_has_the_figures_of_its_last_rows_and_counts_for_no_mean(
    tmp_path: Path,
) -> None:
    ended, other = (written(tmp_path / n, {"seed": s}, loss=0.5) for s, n in enumerate("ab"))
    running = written(tmp_path / "c", {"seed": 2})
    (running / "results.json").unlink()
    rows = [{"step": 2, "loss": 3.0, "seconds": 60.0}, {"step": 4, "loss": 0.75, "seconds": 120.0}]
    (running / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (running / "scores.jsonl").write_text(row_line({"step": 4, "knn": 25.0}, SCORES))
    config = CompareConfig([ended, other, running], columns="loss,training_seconds,probe_knn")
    *_, third, average = cells(compare(config, unfinished={running: "running (step 4)"}))
    assert third == {
        "run": "c", "state": "running (step 4)", "loss": "0.75",
        "training time (h:mm:ss)": "0:02:00", "kNN of the last probe (%)": "25.00",
    }  # fmt: skip
    assert (average["run"], average["loss"]) == ("mean of 2 seeds: a ...", "0.5")


def test_json_has_a_row_for_each_run_with_numbers_that_are_not_rounded(
    tmp_path: Path, capsys
) -> None:
    runs = [written(tmp_path / name, {"seed": seed}, loss=1 / 3) for seed, name in enumerate("ab")]
    table = tmp_path / "table.md"
    assert main(["compare", *map(str, runs), "--json", f"--output={table}"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"run": "a", "seed": 0, "loss": 1 / 3}, {"run": "b", "seed": 1, "loss": 1 / 3},
    ]  # fmt: skip
    assert table.read_text().startswith("| run")


def test_copies_of_a_run_are_no_seeds(tmp_path: Path) -> None:
    runs = [written(tmp_path / name, {"seed": 0}, loss=1.0) for name in "ab"]
    assert [row["run"] for row in cells(compare(CompareConfig(runs)))] == ["a", "b"]


def test_a_number_written_with_or_without_a_fraction_is_no_difference(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"{epochs}", {"curriculum": {"epochs": epochs}, "seed": seed})
            for seed, epochs in enumerate((2, 2.0))]  # fmt: skip
    rows = cells(compare(CompareConfig(runs)))
    assert "curriculum.epochs" not in rows[0]
    assert rows[2]["run"] == "mean of 2 seeds: 2 ..."


def test_a_figure_that_a_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    runs = [written(tmp_path / "a", {"seed": 0}, loss=1.0, knn=30.0),
            written(tmp_path / "b", {"seed": 1}, loss=2.0)]  # fmt: skip
    average = cells(compare(CompareConfig(runs)))[-1]
    assert (average["loss"], average["kNN (%)"]) == ("1.5 ± 0.71", "")


def test_standard_errors_are_columns_on_request_and_numbers_of_images_always(tmp_path) -> None:
    run = written(tmp_path / "a", {"seed": 0}, loss=1.0)
    record = {"knn": 20.0, "knn_standard_error": 4.0, "provenance": {"val_images": 100}}
    write_record(run / "knn", record)
    shown = cells(compare(CompareConfig([run])))[0]
    assert shown == {"run": "a", "loss": "1", "kNN (%)": "20.00", "validation images": "100"}
    chosen = CompareConfig([run], columns="*standard error", format="latex")
    assert "& 4 " in compare(chosen)


def test_figures_have_units_and_constants_no_deviation(tmp_path: Path) -> None:
    runs = [
        written(tmp_path / name, {"seed": seed}, knn=knn, probe_knn=30.123, images=52160,
                equivalent_epochs=2.99891, training_seconds=3600.0 + 60 * seed)
        for seed, (name, knn) in enumerate((("a", 25.0), ("b", 26.666)))
    ]  # fmt: skip
    first, _, average = cells(compare(CompareConfig(runs)))
    assert first == {
        "run": "a", "seed": "0", "kNN (%)": "25.00", "equivalent epochs": "2.999",
        "images": "52,160", "training time (h:mm:ss)": "1:00:00",
    }  # fmt: skip
    assert average == {
        "run": "mean of 2 seeds: a ...", "seed": "", "kNN (%)": "25.83 ± 1.18",
        "equivalent epochs": "2.999", "images": "52,160",
        "training time (h:mm:ss)": "1:00:30 ± 0:00:42",
    }  # fmt: skip


def test_columns_are_chosen_by_key_name_or_pattern_in_their_order(tmp_path: Path) -> None:
    run = written(tmp_path / "a", {"seed": 0, "optim": {"base_lr": 0.1}}, val_loss=0.5,
                  val_images=9, top1=70.0)  # fmt: skip
    write_record(run / "knn", {"data": "x/few", "knn": 30.0})
    table = compare(CompareConfig([run], columns="*knn, Top-1,optim.*,*loss"))
    columns = ["run", "few kNN (%)", "top-1 (%)", "optim.base_lr", "validation loss"]
    (row,) = cells(table)
    assert list(row) == columns
    with pytest.raises(UserError, match=r"columns: no run has 'nn'; figures: .*top1, .*few knn"):
        compare(CompareConfig([run], columns="nn"))


def test_latex_and_csv_are_valid_for_any_name(tmp_path: Path) -> None:
    runs = [written(tmp_path / f"a_{seed}&%", {"data": {"root": "x,y"}, "seed": seed},
                    probe_knn=30.125 + seed) for seed in (0, 1)]  # fmt: skip
    written(tmp_path / "=b", {"data": {"root": "z"}}, probe_knn=-1.0)
    runs.append(tmp_path / "=b")
    lines = compare(CompareConfig(runs, format="latex")).split("\n")
    name = "kNN of the last probe"
    assert lines[:4] == [
        r"\begin{tabular}{llrr}", r"\toprule", rf"run & data.root & seed & {name} (\%) \\",
        r"\midrule",
    ]  # fmt: skip
    assert lines[4] == r"a\_0\&\% & x,y & 0 & 30.12 \\"
    assert lines[7] == r"mean of 2 seeds: a\_0\&\% ... & x,y &  & 30.62 $\pm$ 0.71 \\"
    assert lines[8:] == [r"\bottomrule", r"\end{tabular}", f"% {NOTE}"]
    rows = list(csv.reader(compare(CompareConfig(runs, format="csv")).split("\n")))
    assert rows == [
        ["run", "data.root", "seed", f"{name} (%)"], ["a_0&%", "x,y", "0", "30.125"],
        ["a_1&%", "x,y", "1", "31.125"], ["'=b", "z", "", "-1.0"],
    ]  # fmt: skip


def test_scores_stand_in_the_row_of_the_run_they_belong_to(tmp_path: Path) -> None:
    """Results inside its folder, and classifiers elsewhere that started from its checkpoint."""
    one, two = (written(tmp_path / name, {"seed": seed}, loss=0.5)
                for seed, name in enumerate("ab"))  # fmt: skip
    written(one / "knn", {}, knn=31.5, data="synthetic")
    written(one / "linear-probe", {}, linear=40.5, data="data/cifar10")
    written(two / "knn", {}, knn=29.5, data="synthetic", settings="pool=cls")
    tuned = [
        written(
            tmp_path / f"{kind}-{start.name}",
            {"model": {"checkpoint": str(start / "encoder.safetensors"), "probe": probe}},
            top1=top1,
        )
        for start, kind, probe, top1 in ((one, "ft", "none", 80.0), (two, "probe", "linear", 60.0))
    ]
    first, second, average = cells(compare(CompareConfig([one, two, *tuned])))
    assert (first["run"], first["kNN (%)"]) == ("a", "31.50")
    assert first["finetune top-1 (%)"] == "80.00"
    assert first["cifar10 linear (%)"] == "40.50"  # on other data than the run's
    assert (second["run"], second["finetune-linear top-1 (%)"]) == ("b", "60.00")
    assert (second["kNN (%)"], second["pool=cls kNN (%)"]) == ("", "29.50")
    assert (average["kNN (%)"], average["loss"]) == ("", "0.5")
    (alone,) = cells(compare(CompareConfig([tuned[0]])))
    assert (alone["run"], alone["top-1 (%)"]) == ("ft-a", "80.00")


def test_all_records_of_a_run_are_shown_and_the_latest_has_the_plain_name(tmp_path: Path) -> None:
    run = written(tmp_path / "a", {"data": {"root": "data/own"}}, loss=0.5)
    for data, weights, knn in (
        ("data/own", "x", 10.0), ("x/few", "x", 20.0), ("y/few", "x", 30.0), ("data/own", "y", 40.0)
    ):  # fmt: skip
        provenance = {"weights": weights, "version": knn}
        write_record(run / "knn", {"data": data, "knn": knn, "provenance": provenance})
    (row,) = cells(compare(CompareConfig([run])))
    names = {"": 40, "few ": 30, "few data=x/few ": 20, "weights=x ": 10}
    expected = {f"{name}kNN (%)": knn for name, knn in names.items()}
    assert {key: float(row[key]) for key in row if key.endswith("kNN (%)")} == expected


def test_a_classifier_in_the_folder_of_its_run_has_no_row_of_its_own(tmp_path: Path) -> None:
    start = written(tmp_path / "a", {"seed": 0}, loss=0.5)
    tuned = written(start / "finetune", {"model": {"checkpoint": str(start)}}, top1=70.0)
    (row,) = cells(compare(CompareConfig([start, tuned])))
    assert (row["run"], row["loss"], row["finetune top-1 (%)"]) == ("a", "0.5", "70.00")


def test_losses_and_images_of_training_and_of_validation_are_different_columns(tmp_path) -> None:
    """Also in the files of earlier versions, which gave them the same names."""
    start = written(tmp_path / "a", {"seed": 0}, loss=0.5, images=4000)
    config = {"model": {"checkpoint": "elsewhere"}}
    old = written(tmp_path / "old", config, top1=7.0, loss=2.5, images=300, train_images=1216)
    new = written(tmp_path / "new", config, top1=7.0, val_loss=2.5, val_images=300, images=1216)
    first, *others = cells(compare(CompareConfig([start, old, new])))
    assert (first["loss"], first["validation loss"]) == ("0.5", "")
    assert (first["images"], first["validation images"]) == ("4,000", "")
    for row in others:
        assert (row["loss"], row["validation loss"]) == ("", "2.5")
        assert (row["images"], row["validation images"]) == ("1,216", "300")


def test_a_second_classifier_of_a_run_keeps_its_own_row(tmp_path: Path) -> None:
    start = written(tmp_path / "a", {"seed": 0}, loss=0.5)
    config = {"model": {"checkpoint": str(start)}}
    tuned = [written(tmp_path / name, config | {"seed": seed}, top1=70.0 + seed)
             for seed, name in enumerate(("x", "y"))]  # fmt: skip
    rows = cells(compare(CompareConfig([start, *tuned])))
    assert [row["run"] for row in rows] == ["a", "y"]
    assert (rows[0]["finetune top-1 (%)"], rows[1]["top-1 (%)"]) == ("70.00", "71.00")


def test_a_table_wider_than_the_terminal_has_a_column_for_each_run(tmp_path: Path) -> None:
    runs = [written(tmp_path / name, {"optim": {"base_lr": 10.0**-place}}, loss=0.5, knn=place)
            for place, name in enumerate(("first", "second"), 1)]  # fmt: skip
    config = CompareConfig(runs, output=tmp_path / "table.md")
    rows = compare(config, width=200)
    columns = compare(config, width=30)
    assert max(map(len, rows.split("\n"))) > max(map(len, columns.split("\n")))
    assert [row["run"] for row in cells(columns)] == ["optim.base_lr", "loss", "kNN (%)"]
    assert [row["second"] for row in cells(columns)] == ["0.01", "0.5", "2.00"]
    assert (tmp_path / "table.md").read_text() == rows + "\n"  # independent of the terminal


def test_folders_that_hold_no_run_are_reported_not_compared(tmp_path: Path, capsys) -> None:
    """Of `runs/*`, where one is a folder of images: its row would make every key differ."""
    runs = [written(tmp_path / name, {"name": name}, loss=1.0) for name in "ab"]
    (tmp_path / "plots").mkdir()
    (tmp_path / "slurm-7.out").write_text("")
    others = [tmp_path / "plots", tmp_path / "slurm-7.out"]
    said = f"as they hold no run: {others[0]}, {others[1]}\n"
    table = compare(CompareConfig([*runs, *others, runs[0]]))
    assert [row["run"] for row in cells(table)] == ["a", "b"]
    assert said in capsys.readouterr().err
    assert [record.name for record in read_runs([*runs, *others])] == ["a", "b"]
    assert said in capsys.readouterr().err
    (tmp_path / "plots" / "run").mkdir()
    (tmp_path / "plots" / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match=r"plots holds no run; its folders do: .*plots/\*$"):
        compare(CompareConfig([tmp_path / "plots"]))


def test_an_output_that_compare_did_not_write_is_not_replaced(place: Path, capsys) -> None:
    written(place / "r0", {"seed": 0}, loss=1.0)
    before = (place / "tiny.yaml").read_text()
    for output, sentence in (
        ("r0", "output r0 cannot be written to: Is a directory"),
        ("tiny.yaml", "output tiny.yaml exists, and is not what this command writes"),
    ):
        assert main(["compare", "r0", f"--output={output}"]) == 2
        assert sentence in capsys.readouterr().err
    assert (place / "tiny.yaml").read_text() == before
    for form in ("md", "latex", "csv", "md"):
        assert main(["compare", "r0", "--output=table.md", f"--format={form}"]) == 0
