"""Wrapped state dicts, and how they differ from a model's."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from tiny_run import GOLDEN

from mae_et import UserError, load_pretrained
from mae_et.checkpoints.formats import load_weights, weights_of_payload
from mae_et.checkpoints.state_dicts import describe_mismatch, find_state_dict, largest_state_dict
from mae_et.checkpoints.weight_files import read_weight_file
from mae_et.cli.commands import config_of


def test_differences_from_a_network_are_listed() -> None:
    ours = {"a": torch.zeros(2), "c": torch.zeros(1), "e": torch.zeros(1)}
    theirs = {"a": torch.zeros(1), "d": torch.zeros(1), "e": torch.zeros(1, dtype=torch.int64)}
    assert describe_mismatch(theirs, ours) == (
        "1 missing (c); 1 unexpected (d); 1 misshapen (a is [1], not [2]); "
        "1 of another type (e is torch.int64)"
    )
    assert describe_mismatch({}, {"head.x": torch.zeros(1)}, may_lack=("head.",)) == ""


TINY = GOLDEN / "mae_tiny_released_format.pth"
HEADS = {"encoder_num_heads": 3, "decoder_num_heads": 4}
PATH = Path("checkpoint.pth")


@pytest.fixture(scope="module")
def vit() -> dict[str, torch.Tensor]:
    return read_weight_file(TINY)["model"]


def wrapped(vit: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in vit.items()}


LAYOUTS = {
    "bare": lambda vit: vit,
    "DDP": lambda vit: {"model": wrapped(vit, "module.")},
    "compiled": lambda vit: {"model": wrapped(vit, "_orig_mod.")},
    "DDP of compiled": lambda vit: {"model": wrapped(vit, "module._orig_mod.")},
    "compiled DDP": lambda vit: {"model": wrapped(vit, "_orig_mod.module.")},
    "Lightning": lambda vit: {"state_dict": wrapped(vit, "model."), "hyper_parameters": {"lr": 1}},
    "solo-learn": lambda vit: {"state_dict": wrapped(vit, "backbone.")},
    "lightly": lambda vit: {"state_dict": wrapped(vit, "backbone.vit.")},
    "encoder": lambda vit: {"state_dict": wrapped(vit, "encoder.")},
    "model_state_dict": lambda vit: {"model_state_dict": vit, "optimizer_state_dict": {}},
    "net": lambda vit: {"net": vit},
    "DeepSpeed": lambda vit: {"module": wrapped(vit, "module."), "dp_world_size": 8},
    "accelerate, two levels": lambda vit: {"state": {"weights": {"params": vit}}},
    "blocks compiled one by one": lambda vit: {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor for name, tensor in vit.items()
    },
    "FSDP with activation checkpointing": lambda vit: {
        f"_fsdp_wrapped_module.{name}".replace(
            "blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."
        ): tensor
        for name, tensor in vit.items()
    },
    "NumPy": lambda vit: {"params": {name: tensor.numpy() for name, tensor in vit.items()}},
    "torch.optim.swa_utils": lambda vit: {"n_averaged": torch.tensor(3), **wrapped(vit, "module.")},
    "optimizer by names": lambda vit: {
        "model": vit, "optimizer": {"state": {name: {"exp_avg": t} for name, t in vit.items()}}
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_vit_is_found_in_layouts_of_the_field(layout: str, vit, tmp_path: Path) -> None:
    torch.save(LAYOUTS[layout](vit), tmp_path / "a.pth")
    found, expected = load_pretrained(tmp_path / "a.pth", **HEADS), load_pretrained(TINY, **HEADS)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_our_own_model_saved_in_a_loop_of_ones_own_keeps_its_decoder(tmp_path: Path) -> None:
    model = load_pretrained(TINY, **HEADS)
    for name, payload in (("bare", model.state_dict()),
                          ("ddp", {"model": wrapped(model.state_dict(), "module.")})):  # fmt: skip
        torch.save(payload, tmp_path / name)
        again = load_pretrained(tmp_path / name, **HEADS)
        assert again.decoder is not None
        assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "pair",
    [("student", "teacher"), ("base_encoder", "momentum_encoder"), ("encoder", "target_encoder")],
)
def test_several_candidates_are_listed_and_chosen_by_a_key(pair, vit, tmp_path: Path) -> None:
    """As DINO and iBOT, MoCo v3 and I-JEPA save them."""
    first, second = pair
    other = vit | {"cls_token": torch.ones(1, 1, 48)}
    dino = {first: wrapped(vit, "module.backbone."), second: wrapped(other, "backbone.")}
    moco = {"state_dict": wrapped(vit, f"module.{first}.") | wrapped(other, f"module.{second}.")}
    for payload in (dino, moco):
        torch.save(payload, tmp_path / "a.pth")
        with pytest.raises(UserError, match=f"several sets .*checkpoint_key.*{first}.*{second}"):
            load_pretrained(tmp_path / "a.pth", **HEADS)
        for key, weights in ((first, vit), (second, other)):
            found = load_pretrained(tmp_path / "a.pth", **HEADS, checkpoint_key=key)
            assert torch.equal(found.encoder.cls_token, weights["cls_token"])
            words = [f"--checkpoint={tmp_path / 'a.pth'}", f"--model.checkpoint_key={key}"]
            assert config_of("finetune", words).model.channels == 3
        with pytest.raises(UserError, match=f"nothing under 'no': .*{first}"):
            load_pretrained(tmp_path / "a.pth", **HEADS, checkpoint_key="no")


@pytest.mark.parametrize(
    ("raw", "average"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema_state_dict"),
     ("params", "params_ema"), ("net", "ema_weights"), ("student", "teacher_ema")],
)  # fmt: skip
def test_a_moving_average_is_taken_and_reported(raw, average, vit, tmp_path, capsys) -> None:
    ema = vit | {"cls_token": torch.ones(1, 1, 48)}
    torch.save({raw: vit, average: wrapped(ema, "module.")}, tmp_path / "a.pth")
    found = load_pretrained(tmp_path / "a.pth", **HEADS)
    assert found.encoder.cls_token.eq(1).all()
    assert f"taking the moving average {average}.module, not {raw}" in capsys.readouterr().err
    found = load_pretrained(tmp_path / "a.pth", **HEADS, checkpoint_key=raw)
    assert torch.equal(found.encoder.cls_token, vit["cls_token"])
    assert not capsys.readouterr().err


def test_a_moving_average_of_parameters_alone_is_completed(vit, tmp_path: Path, capsys) -> None:
    """MAE's positions are a constant, which some trainers do not average."""
    ema = vit | {"cls_token": torch.ones(1, 1, 48)}
    del ema["pos_embed"]
    torch.save({"model": vit, "model_ema": ema}, tmp_path / "a.pth")
    found = load_pretrained(tmp_path / "a.pth", **HEADS)
    assert found.encoder.cls_token.eq(1).all()
    assert torch.equal(found.encoder.pos_embed, vit["pos_embed"])
    assert "it lacks pos_embed, taken from model" in capsys.readouterr().err


def test_an_average_without_names_is_reported(vit, capsys) -> None:
    payload = {"model": vit, "ema": {"decay": 0.9, "shadow_params": list(vit.values())}}
    found = find_state_dict(PATH, payload, vit.keys())
    assert torch.equal(found["cls_token"], vit["cls_token"])
    assert "average in ema.shadow_params has no names and is not used" in capsys.readouterr().err


def test_tensors_beside_a_state_dict_are_reported(vit, capsys) -> None:
    payload = {"state_dict": {f"vit.{n}": t for n, t in vit.items()} | {"prompt": torch.ones(2)},
               "lora": {"qkv.A": torch.ones(2, 2)}}  # fmt: skip
    assert find_state_dict(PATH, payload, vit.keys()).keys() == vit.keys()
    line = f"{PATH}: tensors that are not read: 2 (state_dict.prompt, lora.qkv.A)"
    assert line in capsys.readouterr().err
    others = {"epoch": torch.tensor(3), "optimizer": {"moment": torch.ones(2)},
              "rng_state": torch.get_rng_state()}  # fmt: skip
    find_state_dict(PATH, {"model": vit} | others, vit.keys())
    assert not capsys.readouterr().err


def test_quantised_weights_are_refused(vit) -> None:
    payload = vit | {"blocks.0.mlp.fc1.weight": torch.ones(8, 4, dtype=torch.int8)}
    with pytest.raises(UserError, match=r"quantised weights \(blocks.0.mlp.fc1.weight"):
        find_state_dict(PATH, payload, vit.keys())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(vit, value: float) -> None:
    payload = vit | {"cls_token": torch.full_like(vit["cls_token"], value)}
    with pytest.raises(UserError, match=r"weights that are not finite numbers \(cls_token\)"):
        weights_of_payload(PATH, payload)


@pytest.mark.parametrize(
    "change", [torch.Tensor.to_sparse, lambda t: t.to("meta"), lambda t: t.to(torch.complex64)]
)
def test_weights_that_are_no_plain_numbers_are_refused(vit, change) -> None:
    with pytest.raises(UserError, match=r"sparse, complex or quantised weights \(cls_token\)"):
        find_state_dict(PATH, vit | {"cls_token": change(vit["cls_token"])}, vit.keys())


def test_a_safetensors_header_that_starts_like_a_pickle_is_read(tmp_path: Path) -> None:
    """Its first bytes are a length: 640 is 0x0280, the first bytes of a pickle."""
    tensors = {"a": torch.ones(2)}
    bare = int.from_bytes(safetensors.torch.save(tensors, {"k": ""})[:8], "little")
    content = safetensors.torch.save(tensors, {"k": "x" * (640 - bare)})
    assert content[:2] == b"\x80\x02"
    (tmp_path / "a").write_bytes(content)
    assert torch.equal(read_weight_file(tmp_path / "a")["a"], tensors["a"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype, vit, tmp_path: Path) -> None:
    torch.save({"model": {name: tensor.to(dtype) for name, tensor in vit.items()}}, tmp_path / "a")
    model = load_pretrained(tmp_path / "a", **HEADS)
    for name, tensor in load_pretrained(TINY, **HEADS).state_dict().items():
        assert model.state_dict()[name].dtype == torch.float32
        assert torch.equal(model.state_dict()[name], tensor.to(dtype).float())


def test_the_state_dict_of_any_network_is_found() -> None:
    """A name that only a part of it completes is chance."""
    network = timm.create_model("resnet10t", num_classes=2)
    weights = network.state_dict()
    payload = {"epoch": 3, "state_dict": {f"module._orig_mod.{n}": t for n, t in weights.items()}}
    found = find_state_dict(PATH, payload, weights.keys())
    assert found.keys() == weights.keys()
    assert find_state_dict(PATH, {"epoch": 3}, weights.keys()) == {}


def test_largest_state_dict_is_taken_where_no_name_is_known() -> None:
    weights = {"stem.weight": torch.ones(2, dtype=torch.float16), "head.weight": torch.zeros(3)}
    found = largest_state_dict(
        PATH, {"epoch": 3, "net": weights, "ema": {"decay": torch.tensor(0.9)}}
    )
    assert list(found) == ["stem.weight", "head.weight"]
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert largest_state_dict(PATH, {"epoch": 3}) == {}


def test_a_key_that_would_choose_nothing_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({}, tmp_path / "model.safetensors")
    for name in ("config.json", "classes.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match=r"checkpoint_key ema: .* holds one network"):
            load_weights(tmp_path, "ema")
        (tmp_path / name).unlink()
    torch.save({"config": {}, "plan": {}}, tmp_path / "run.pt")
    with pytest.raises(UserError, match=r"checkpoint_key ema: .* holds one network"):
        load_weights(tmp_path / "run.pt", "ema")
