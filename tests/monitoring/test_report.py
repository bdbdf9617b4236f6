"""A report is one self-contained file that shows what run folders hold and executes nothing."""

import io
import json
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae_et.cli.main import main
from mae_et.curriculum.schedule import Curriculum
from mae_et.errors import UserError
from mae_et.io.metrics_file import read_metrics, row_line
from mae_et.monitoring.compared_runs import names_of
from mae_et.monitoring.figures import short
from mae_et.monitoring.report import report

EVIL = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
# Keys that a report reads.
WORDS = """
    step stage loss lr grad_norm seconds window_steps window_seconds time top1 raw_top1 images knn
    model data seed optim curriculum index bandwidth start steps cost magnitude base base_cost spike
    batch_size dataset_size images_per_second data_time_fraction memory_gib
"""
KEYS = st.sampled_from(WORDS.split())
VOID = {"meta", "img", "link", "br"}


class Page(HTMLParser):
    """The elements and texts of a page; every element must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def attributes(self, name: str) -> list[str]:
        return [value or "" for _, found in self.elements for key, value in found.items()
                if key == name]  # fmt: skip


@pytest.fixture
def run(trained: Path, tmp_path_factory) -> Path:
    """A finished run that was scored."""
    path = Path(shutil.copytree(trained, tmp_path_factory.mktemp("report") / "run"))
    (path / "knn").mkdir()
    (path / "knn" / "results.json").write_text('{"knn": 31.75}')
    return path


def written(folder: Path, **files: object) -> Path:
    """Write the folder of a run of 20 steps: a list becomes JSON lines, a dict JSON."""
    plan = Curriculum.preset("constant", 32, 8).plan(5, 40, 10)
    rows = [
        {"step": step, "stage": 0, "loss": 1 / step, "seconds": step / 2, "time": 1.7e9}
        for step in (5, 10, 15)
    ]
    given = {"metrics.jsonl": rows, "plan.json": plan.to_dict(), "config.yaml": "seed: 3\n"}
    for name, content in (given | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(row_line(row, name) for row in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_the_page_is_self_contained(run: Path, tmp_path: Path) -> None:
    path = report([run], tmp_path / "report.html")
    page, text = Page(path), path.read_text()
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for address in page.attributes("src") + page.attributes("href"):
        assert address.startswith(("data:image/webp;base64,", "#"))
    assert "url(" not in text
    assert "@import" not in text
    assert not [name for _, found in page.elements for name in found if name.startswith("on")]
    policy = next(v for v in page.attributes("content") if "default-src" in v)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_page_shows_metrics_results_and_config(run: Path, tmp_path: Path) -> None:
    images = sorted((run / "reconstructions").glob("*.png"))
    Image.new("RGB", (1840, 300)).save(images[0])  # is embedded in half of its size
    page = Page(report([run], tmp_path / "report.html"))
    rows, results = read_metrics(run), json.loads((run / "results.json").read_text())
    for row in rows:
        assert f"step {row['step']:,}: {short(row['loss'])}" in page.texts
        assert f"step {row['step']:,}: {short(row['lr'])}" in page.texts
    for expected in ("run", "finished", "31.75 %", f"{results['loss']:.5g}", f"{25 * 12:,}"):
        assert expected in page.texts
    titles = page.attributes("title")
    for bandwidth, stage in zip((16, 24, 32), results["stages"], strict=True):
        share = 100 * stage["compute"] / results["compute"]
        seen = 100 * stage["images"] / results["images"]
        assert (
            f"bandwidth {bandwidth}: {share:.1f} % of the compute, {seen:.1f} % of the images"
        ) in titles
    shaded = (found for _, found in page.elements if (found.get("class") or "").startswith("band"))
    widths = [float(found["width"] or 0) for found in shaded if "width" in found]
    charts = [np.divide(each, sum(each)) for each in zip(*[iter(widths)] * 3, strict=True)]
    for key in ("compute", "images"):  # the axes of two charts, shaded by bandwidth
        shares = [stage[key] / results[key] for stage in results["stages"]]
        assert any(each == pytest.approx(shares, abs=0.01) for each in charts)
    assert (run / "config.yaml").read_text().strip() in page.texts
    embedded = [b64decode(source.partition(",")[2]) for source in page.attributes("src")]
    assert len(embedded) == len(images) == 2
    assert Image.open(io.BytesIO(embedded[0])).size == (920, 150)
    for curve in (
        "Training loss by compute",
        "Learning rate",
        "Gradient norm",
        "Images per second",
    ):
        assert curve in page.texts


def test_magnitudes_are_shown_only_if_data_are_augmented(tmp_path: Path) -> None:
    for place, augment in enumerate(("rand-mstd0.5", None)):
        config = f"data: {{augment: {json.dumps(augment)}}}\n"
        run = written(tmp_path / str(place), **{"config.yaml": config})
        page = Page(report([run], tmp_path / "report.html"))
        assert ("magnitude" in page.texts) == (augment is not None)


def test_html_in_run_folders_is_shown_as_text(tmp_path: Path) -> None:
    run = written(
        tmp_path / "<script>alert(1)<script>",
        **{
            "config.yaml": f"seed: {json.dumps(EVIL)}\nmodel: {{target: {json.dumps(EVIL)}}}\n",
            "results.json": {EVIL: 1.0, "note": EVIL, "loss": EVIL},
            "scores.jsonl": [{"step": 5, "time": 0, "top1": EVIL, EVIL: 5}],
        },
    )
    page = Page(report([run, written(tmp_path / "b")], tmp_path / "report.html"))
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert EVIL in page.texts
    assert "<script>alert(1)<script>" in page.texts


def test_an_unfinished_run_is_shown_up_to_its_last_row(tmp_path: Path) -> None:
    page = Page(report([written(tmp_path / "a")], tmp_path / "a.html"))
    assert any(text.startswith("not finished: 75% of the compute done") for text in page.texts)
    assert "step 15: 0.06667" in page.texts
    fresh = written(tmp_path / "b", **{"metrics.jsonl": ""})
    page = Page(report([fresh], tmp_path / "b.html"))
    assert {"no step yet", "There are no metrics yet."} <= set(page.texts)
    bare = tmp_path / "c"
    bare.mkdir()
    (bare / "config.yaml").write_text("{}")
    assert "no step yet" in Page(report([bare], tmp_path / "c.html")).texts


def test_values_and_images_that_cannot_be_drawn_are_skipped(tmp_path: Path) -> None:
    """Non-finite values, malformed rows, damaged images and images of later steps."""
    rows: list = [
        {"step": 5, "loss": 2.0}, {"step": 10, "loss": float("nan")}, 7, {"loss": 1.0},
        {"step": 15, "loss": None}, {"step": 20, "loss": 10**400}, {"step": 12, "loss": 3.0},
    ]  # fmt: skip
    run = written(tmp_path / "a", **{
        "metrics.jsonl": rows, "reconstructions/step-00000005.png": "no image",
        "reconstructions/step-x.png": "",
    })  # fmt: skip
    for step in (10, 99):
        Image.new("RGB", (8, 8)).save(run / "reconstructions" / f"step-{step:08d}.png")
    page = Page(report([run], tmp_path / "a.html"))
    shown = {text for text in page.texts if text.startswith("step ") and ": " in text}
    assert shown == {"step 5: 2", "step 12: 3"}
    assert len(page.attributes("src")) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


LINES = st.lists(st.dictionaries(KEYS, JSON, max_size=6), max_size=4)
SECTIONS = st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON), max_size=4)
WILD = {
    "config.yaml": (JSON | SECTIONS).map(json.dumps), "results.json": JSON, "plan.json": JSON,
    "metrics.jsonl": LINES, "scores.jsonl": LINES,
}  # fmt: skip


@settings(max_examples=20)
@given(wild=st.fixed_dictionaries({}, optional=WILD), data=st.data())
def test_arbitrary_run_files_give_a_page_or_a_user_error(tmp_path_factory, wild, data) -> None:
    folder = tmp_path_factory.mktemp("any")
    if isinstance(wild.get("plan.json"), dict):  # a plan with a few other values
        whole = Curriculum.preset("etpp", 32, 8).plan(9, 40, 10).to_dict()
        stages = [whole["stages"][0] | data.draw(st.dictionaries(KEYS, JSON)), *whole["stages"][1:]]
        wild = wild | {"plan.json": whole | {"stages": stages} | wild["plan.json"]}
    runs = [written(folder / "wild", **wild), written(folder / "good")]
    try:
        Page(report(runs, folder / "report.html"))
    except UserError as error:
        assert re.search(r"wild/[\w.]+ ", str(error))  # noqa: PT017


def test_spikes_are_marked(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0, "spike": step == 10} for step in (5, 10, 15)]
    page = Page(report([written(tmp_path / "a", **{"metrics.jsonl": rows})], tmp_path / "a.html"))
    assert "a: loss spike before step 10" in page.texts


def test_several_runs_are_compared_by_their_differences(run: Path, tmp_path: Path) -> None:
    scores = [{"step": step, "time": 0, "top1": 5.0 * step, "raw_top1": 1.0} for step in (5, 10)]
    one = written(tmp_path / "x" / "finetune", **{"scores.jsonl": scores})
    two = written(tmp_path / "y" / "finetune", **{"config.yaml": "seed: 4\n"})
    page = Page(report([one, run, two], tmp_path / "report.html"))
    assert {"3 runs", "Pre-training", "Classifiers", "x/finetune", "y/finetune"} <= set(page.texts)
    assert {"3", "4"} <= set(page.texts)
    assert "seed" in page.texts
    assert "step 10: 50" in page.texts  # a point names its run if there are several
    assert "run, step 2: " in "\n".join(page.texts)
    for by in ("compute", "images", "time"):  # titles are unique
        assert page.texts.count(f"Validation top-1 (%) by {by}") == 1
    links = [link for link in page.attributes("href") if link.startswith("#")]
    assert set(links) == {"#run-1", "#run-2", "#run-3"} <= {f"#{i}" for i in page.attributes("id")}


def test_probes_of_a_pre_training_are_drawn(tmp_path: Path) -> None:
    scores = [{"step": step, "time": 0, "knn": 2.0 * step, "effective_rank": 9} for step in (0, 10)]
    run = written(tmp_path / "run", **{"scores.jsonl": scores})
    texts = Page(report([run], tmp_path / "report.html")).texts
    assert "Validation top-1 (%) by compute" not in texts
    for by in ("compute", "images", "time"):
        assert f"Probe: kNN (%) by {by}" in texts
    assert {"Probe: effective rank by compute", "step 0: 0", "step 10: 20"} <= set(texts)
    both = report([run, written(tmp_path / "other")], tmp_path / "report.html")
    assert "Pre-training" in Page(both).texts


def test_names_of_runs_are_unique_ends_of_their_paths(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a/run", "b/run", "c/other", "c/finetune")]
    assert names_of(paths) == ["a/run", "b/run", "other", "c/finetune"]


def test_user_errors_are_one_sentence(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = written(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    damaged = {
        "plan.json": '{"stages": [], "base": 1}', "results.json": "[1]", "config.yaml": "a: [",
        "knn/results.json": "{",
    }  # fmt: skip
    mistakes = {
        "there is no run folder nowhere": ["nowhere"],
        "empty holds no run": ["empty"],
        "a run folder is given twice": ["good", "./good/"],
        "--output good is a folder": ["good", "--output=good"],
        "output good/plan.json/x: Not a directory": ["good", "--output=good/plan.json/x"],
        "output good/plan.json exists, and is not what": ["good", "--output=good/plan.json"],
        "RUN must be given": [],
    }
    for name, content in damaged.items():
        run = written(tmp_path / f"no-{name}".replace("/", "-"))
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(content)
        mistakes[f"{run.name}/{name} "] = [run.name]
    for sentence, words in mistakes.items():
        assert main(["report", *words]) == 2, sentence
        said = capsys.readouterr()
        assert sentence in said.err
        assert said.err.count("\n") == 1, said.err
        assert not said.out
    (tmp_path / "report.html").write_text("")
    for _ in range(2):  # a report is replaced
        capsys.readouterr()
        assert main(["report", "good"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": "report.html"}
    assert (tmp_path / "report.html").exists()
    assert good.is_dir()


@pytest.fixture
def opened(run: Path, tmp_path: Path) -> Iterator[tuple]:
    name = "<img src=x onerror=document.title='run'>"
    evil = written(tmp_path / name, **{"config.yaml": f"seed: {json.dumps(EVIL)}"})
    path = report([run, evil], tmp_path / "report.html")
    with chromium(viewport={"width": 390, "height": 800}) as page:
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.context.set_offline(True)
        page.goto(path.as_uri())
        yield page, asked, said, path


@pytest.mark.slow
def test_no_text_of_a_chart_is_clipped_on_a_phone(opened) -> None:
    """Of all charts: each label lies within the card around it."""
    page, *_ = opened
    outside = page.evaluate("""
        [...document.querySelectorAll(".plot text")].filter(text => {
            const inner = text.getBoundingClientRect();
            const card = text.closest(".plot").getBoundingClientRect();
            return inner.left < card.left || inner.right > card.right;
        }).map(text => text.textContent)
    """)
    assert outside == []
    assert page.locator(".plot text").count() > 20


@pytest.mark.slow
def test_a_browser_shows_the_page_offline_on_a_phone_and_executes_nothing(opened) -> None:
    page, asked, said, path = opened
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert said == []
    assert page.title() == "2 runs · mae-et"
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1]
    sizes = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(sizes) == 2  # reconstructions, in the middle and at the end
    assert min(sizes) > 0
    assert page.locator("svg path.line").count() > 5
    assert not page.get_by_text("mask_ratio: 0.75").is_visible()
    page.get_by_text("Full config").first.click()
    assert page.get_by_text("mask_ratio: 0.75").is_visible()
