"""`mae-et plan` computes stages, costs and hours of recipes."""

import json

import pytest

from mae_et.cli.main import main


def last_json(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def test_the_headline_plan_costs_a_quarter_of_1600_epochs(capsys) -> None:
    assert main(["plan", "--config", "pretrain/vit_b16_etpp_hog_400ep", "--json"]) == 0
    plan = last_json(capsys.readouterr().out)
    assert plan["dataset_size"] == 1_281_167
    assert plan["speedup"] == pytest.approx(4.0, rel=0.01)
    assert len(plan["stages"]) == 10
    assert sum(s["share"] for s in plan["stages"]) == pytest.approx(1)
    assert sum(s["steps"] for s in plan["stages"]) == plan["steps"]


def test_plan_resolves_the_recipes_of_classifiers_too(capsys) -> None:
    speeds = ["--throughput={96: 9000, 160: 4000, 224: 2000}", "--gpus=8"]
    assert main(["plan", "--config", "supervised/resnet50", "--json", *speeds]) == 0
    plan = last_json(capsys.readouterr().out)
    assert (plan["dataset_size"], len(plan["stages"])) == (1_281_167, 10)
    assert plan["equivalent_epochs"] == pytest.approx(200, rel=1e-3)
    assert plan["speedup"] == pytest.approx(plan["epochs"] / 200, rel=1e-3)  # not of MAE's 1600
    assert plan["throughput"]
    tuned = ["--config=finetune/vit_s16", "--model.backbone=vit_small_patch16_224"]
    assert main(["plan", *tuned, "--images=2048", "--curriculum.cost=flops"]) == 0
    assert "as much as 100.0 epochs" in capsys.readouterr().out
    assert main(["plan", "--config=finetune/vit_s16"]) == 2
    assert "give --checkpoint (model.checkpoint) or model.back" in capsys.readouterr().err


def test_plan_prints_a_table_without_json(capsys) -> None:
    flags = ["--images", "1000", "--against-epochs", "800", "--optim.batch_size", "100"]
    assert main(["plan", "--config=pretrain/vit_s16_etpp", "--curriculum.cost=area", *flags]) == 0
    text = capsys.readouterr().out
    assert "1,000 images, batch 100; compute in pixels, as much as 400.0 epochs" in text
    assert "2.00x less compute than 800 epochs" in text
    assert len([line for line in text.splitlines() if " 160 " in line]) == 4


def test_plan_compares_a_short_budget_with_its_own_images(capsys) -> None:
    flags = ["--config=demo", "--images=1000", "--curriculum.cost=area", "--curriculum.epochs=12"]
    assert main(["plan", *flags, "--json"]) == 0
    short = last_json(capsys.readouterr().out)
    assert short["against_epochs"] == short["epochs"]
    assert short["speedup"] == pytest.approx(short["epochs"] / short["equivalent_epochs"])
