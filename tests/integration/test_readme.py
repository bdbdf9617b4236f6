"""The commands, keys, links and examples of README, CONTRIBUTING and docs/ work as written."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import mae_et
from mae_et.checkpoints.writers.tensor_files import export_encoder
from mae_et.cli.arguments import parse
from mae_et.cli.commands import COMMANDS, find
from mae_et.cli.main import main
from mae_et.config.files import load_config
from mae_et.config.model import ModelConfig
from mae_et.config.schema import PretrainConfig
from mae_et.config.shipped import find_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
GUIDES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ("README.md", "CONTRIBUTING.md", *GUIDES)
CHECKED = ("slurm", "monitoring", "curriculum", "features")
# Files that the reader writes, as the pages show.
OWN = {
    "my_changes.yaml",
    "my_run.yaml",
    "photos.yaml",
    "classify.yaml",
    "runs/search/curriculum.yaml",
}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def command_lines() -> list[list[str]]:
    """Return the arguments of every mae-et command in the README and the pages under docs."""
    text = "".join([README, *((ROOT / "docs" / f"{page}.md").read_text() for page in CHECKED)])
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", text, re.DOTALL)
    shell = "\n".join(blocks)
    joined = shell.replace("\\\n", " ")
    found = re.findall(r"(?:^\$ |^|/)(?:mae-et|torchrun .*-m mae_et) (.*)$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def test_readme_has_the_basic_commands() -> None:
    assert {words[0] for words in command_lines()} >= {"demo", "plan", "pretrain", "knn"}


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_command_exists_and_its_flags_parse(
    words: list[str], tmp_path: Path, monkeypatch, capsys
) -> None:
    assert words[0] in COMMANDS
    if words[0] == "submit":
        monkeypatch.chdir(tmp_path)
        (tmp_path / "my_cluster.yaml").write_text(find_config("cluster/example").read_text())
        assert main([*words, "--dry-run"]) == 0
        assert "#SBATCH --requeue" in capsys.readouterr().out
        assert [path.name for path in tmp_path.iterdir()] == ["my_cluster.yaml"]
        return
    if words[0] in {"status", "compare", "report"}:  # their runs do not exist here
        assert main(words) == 2
        assert "there is no run folder" in capsys.readouterr().err
        return
    command, flags = find(words)
    if command.name == "preview":  # the run does not exist here
        flags = [word for word in flags if word != "runs/photos"]
    for own in OWN | {"my_cluster.yaml"}:  # files of the reader
        if own in flags:
            place = flags.index(own)
            del flags[place - 1 : place + 1]
    assert isinstance(parse(command, flags), command.config)


def test_yaml_example_is_a_valid_config(tmp_path: Path) -> None:
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    (tmp_path / "mine.yaml").write_text(text)
    config = load_config(PretrainConfig, [tmp_path / "mine.yaml"])
    assert [stage.bandwidth for stage in config.curriculum.stages] == [64, 96, 128]


PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def test_encoder_example_runs_as_written(tmp_path: Path, monkeypatch) -> None:
    """On a run of a smaller encoder."""
    config = ModelConfig("vit_tiny_patch16_224", decoder_depth=1, decoder_embed_dim=32)
    encoder = mae_et.MaskedAutoencoder.from_config(config).encoder
    run = tmp_path / "runs" / "vit_b16"
    run.mkdir(parents=True)
    export_encoder(encoder, run / "encoder.safetensors", config)
    monkeypatch.chdir(tmp_path)
    (text,) = [text for text in PYTHON if "load_encoder" in text]
    names = {"images": torch.rand(2, 3, 224, 224)}
    exec(text, names)
    assert names["features"].shape == (2, 192)
    timm_model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    timm_model.load_state_dict(load_file(run / "encoder.safetensors"))


def test_python_example_runs_as_written() -> None:
    (text,) = [text for text in PYTHON if "Curriculum" in text]
    names = {"images": torch.rand(1, 3, 224, 224)}
    exec(text, names)
    assert names["small"].shape == (1, 3, 96, 96)
    assert names["loss"].isfinite()
    first = next(iter(names["sampler"]))
    assert len(first) == 4096
    assert {index.stage for index in first} == {0}


def test_links_and_images_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), target


def test_lines_of_prose_fit_in_120_characters() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        assert not [line for line in prose.splitlines() if len(line) > 120 and line[0] != "|"], page


def test_files_named_in_the_pages_exist() -> None:
    rooms = "mae_et|finetune|slurm|tests|benchmarks|configs|examples"
    for page in (*PAGES, "benchmarks/RESULTS.md", "benchmarks/SEARCH.md"):
        for name in re.findall(
            rf"`((?:{rooms})/[\w/]+\.(?:py|yaml|md))`", (ROOT / page).read_text()
        ):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def test_recipes_named_in_the_readme_exist() -> None:
    for pattern in re.findall(r"`(vit_\{[^`]+)`", README):
        for size in ("s16", "b16", "l16", "h14"):
            for budget in ("800ep", "1600ep"):
                name = pattern.replace("{s16,b16,l16,h14}", size).replace("{800ep,1600ep}", budget)
                assert find_config(f"pretrain/{name}").is_file()


def table_after(heading: str, page: str) -> list[list[str]]:
    """Return the cells of the first table after a heading, without its head."""
    rows = page.split(heading)[1].split("\n## ")[0].splitlines()
    return [row.strip("|").split("|") for row in rows if row.startswith("|")][2:]


def test_tour_follows_the_data_through_nine_rooms_that_exist() -> None:
    rows = table_after("## A tour of the code", CONTRIBUTING)
    assert len(rows) == 9
    for _, rooms, files in rows:
        paths = [ROOT / room for room in re.findall(r"`([^`]+)`", rooms)]
        assert all(path.exists() for path in paths), rooms
        parents = [path if path.is_dir() else path.parent for path in paths]
        parents += [parent.parent for parent in parents]
        for name in re.findall(r"`([\w/]+(?:\.py|/))`", files):
            assert any((parent / name).exists() for parent in parents), name


def test_where_do_i_change_names_a_file_and_what_it_defines() -> None:
    rows = table_after("## Where do I change", CONTRIBUTING)
    topics = ["target", "schedule", "decoder", "dataset", "checkpoint format", "cluster"]
    assert [row[0].strip() for row in rows] == topics
    for row in rows:
        names = re.findall(r"`([^`]+)`", " ".join(row))
        code = "".join((ROOT / name).read_text() for name in names if name.endswith(".py"))
        defined = [name for name in names if re.fullmatch(r"[A-Za-z_.]+", name)]
        defined = [name for name in defined if not name.endswith(".py") and name != "data.name"]
        assert defined
        for name in defined:
            for part in name.split("."):
                assert re.search(rf"(?m)^ *(?:def |class |)\b{part}\b(?:\(|:| =)", code), name


FAULT_COMMANDS = sorted(
    {
        command.replace("T/", "tests/robustness/faults/", 1)
        for page in GUIDES
        if page.startswith("docs/reliability")
        for command in re.findall(r"`(?:pytest )?([^`]*\.py[^`]*)`", (ROOT / page).read_text())
        if command.startswith(("T/", "tests/", "-"))
    }
)


def test_every_fault_has_a_command() -> None:
    pages = [(ROOT / page).read_text() for page in GUIDES if page.startswith("docs/reliability")]
    rows = re.findall(r"(?m)^\| (?!fault).*\|$", "\n".join(pages))
    assert len(rows) > 30
    for row in rows:
        assert re.search(r"`(?:pytest |T/)[^`]*`[^|]*\|$", row), row


@pytest.mark.parametrize("command", FAULT_COMMANDS)
def test_command_about_a_fault_selects_a_test(command: str) -> None:
    """Every part of `-k` matches the name or the parameters of a test.

    Read from the text, because pytest takes seconds to collect a file.
    """
    words = shlex.split(command)
    text = "\n\n\n".join((ROOT / word).read_text() for word in words if word.endswith(".py"))
    tests = [part for part in text.split("\n\n\n") if "def test_" in part]
    if "slow" in words:
        tests = [test for test in tests if "mark.slow" in test]
    assert tests
    for part in words[words.index("-k") + 1].split(" or ") if "-k" in words else []:
        wanted = part.split(" and ")
        assert any(all(word in head_of(test) for word in wanted) for test in tests), part


def head_of(test: str) -> str:
    """Return the marks and name of a test, with numbers as pytest writes them."""
    marks, _, rest = test.partition("def test_")
    return re.sub(r"(?<=\d)_(?=\d)", "", marks) + rest.partition("(")[0]
