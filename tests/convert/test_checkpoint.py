"""A checkpoint that would run code does not, and the refusal says what it asked for."""

import json
import os
import pickle

import pytest
import torch

from tiltscope.engine.convert.checkpoint import read_checkpoint
from tiltscope.engine.convert.convert import ConvertSettings, convert
from tiltscope.engine.errors import BundleError, ConfigError


class Bomb:
    """Unpickling it runs a command."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def saved(path, value, form):
    if form == "torch":
        torch.save(value, path)
    elif form == "old torch":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(value, protocol=4))
    return path


@pytest.mark.parametrize("form", ["torch", "old torch", "pickle"])
@pytest.mark.parametrize("place", ["top", "beside weights"])
def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path, form, place):
    canary = tmp_path / "canary"
    bomb = Bomb(canary)
    value = bomb if place == "top" else {"model": {"weight": torch.zeros(2)}, "extra": bomb}
    path = saved(tmp_path / "model.pth", value, form)
    # The trap works: a plain reader falls into it.
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.exists()
    canary.unlink()
    with pytest.raises(BundleError, match=r"would run code when it is read: it asks for .*It was not read") as told:
        read_checkpoint(path)
    assert not canary.exists()
    assert "system" in str(told.value) or form == "pickle"


def test_a_whole_pickled_model_is_refused_by_its_class(tmp_path):
    path = saved(tmp_path / "model.pth", torch.nn.Linear(2, 2), "torch")
    with pytest.raises(BundleError, match=r"torch.nn.modules.linear.Linear"):
        read_checkpoint(path)


def test_the_command_refuses_with_code_2_and_writes_nothing(tmp_path, capsys):
    from tiltscope.engine.cli.main import run

    path = saved(tmp_path / "model.pth", {"x": Bomb(tmp_path / "canary")}, "torch")
    assert run(["convert", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert "would run code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"a.weight": torch.ones(2)}, {"a.weight"}),
        ({"model": {"module.a": torch.ones(2), "module.b": torch.ones(1)}, "step": 3}, {"a", "b"}),
        ({"model": {"a": torch.zeros(2)}, "ema": {"a": torch.ones(2)}}, {"a"}),
        ({"teacher": {"backbone.a": torch.ones(2)}, "optimizer": {"lr": 0.1}}, {"a"}),
    ],
)
def test_weights_are_found_where_scripts_put_them_averaged_ones_first(tmp_path, value, names):
    found = read_checkpoint(saved(tmp_path / "model.pt", value, "torch"))
    assert set(found.tensors) == names
    assert float(found.tensors[min(names)].sum()) == 2


def test_a_line_of_json_before_the_weights(tmp_path):
    state = {"W_enc": torch.ones(2, 3)}
    with (tmp_path / "sae.pt").open("wb") as file:
        file.write(json.dumps({"schema": 2, "cfg": {"d_vit": 2}}).encode() + b"\n")
        torch.save(state, file)
    found = read_checkpoint(tmp_path / "sae.pt")
    assert found.header["cfg"] == {"d_vit": 2}
    assert torch.equal(found.tensors["W_enc"], state["W_enc"])


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut", b"{not json\n", b"\x80\x02."])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot be read as a checkpoint|would run code"):
        read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="is not there"):
        read_checkpoint(tmp_path / "nowhere.pth")


def test_weights_of_no_kind_that_is_known_are_named(tmp_path):
    path = saved(tmp_path / "x.pt", {f"layer{at}": torch.zeros(1) for at in range(5)}, "torch")
    with pytest.raises(
        BundleError, match=r"of no kind that is known \(its tensors: layer0, layer1, layer2 and 2 more\)"
    ):
        convert(path, tmp_path / "out", ConvertSettings())
    with pytest.raises(BundleError, match="holds no weights"):
        read_checkpoint(saved(tmp_path / "y.pt", {"step": 3, "text": "x"}, "torch"))


def test_saev_and_overcomplete_become_folders_that_bundle_takes(tmp_path):
    from tiltscope.engine.bundling.autoencoders import import_sae

    generator = torch.Generator().manual_seed(0)
    state = {
        "W_enc": torch.randn(6, 9, generator=generator),
        "b_enc": torch.randn(9, generator=generator),
        "W_dec": torch.randn(9, 6, generator=generator),
        "b_dec": torch.randn(6, generator=generator),
    }
    with (tmp_path / "sae.pt").open("wb") as file:
        header = {"schema": 2, "cfg": {"activation": {"cls": "Relu", "params": {}}}}
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    assert (
        convert(tmp_path / "sae.pt", tmp_path / "a", ConvertSettings(hook="blocks.3"))
        == "an autoencoder of 9 latents (relu)"
    )
    found = import_sae(tmp_path / "a")
    assert (found.hook, found.kind) == ("blocks.3", "relu")
    assert torch.equal(found.sae.weight, state["W_enc"].T)
    other = {"encoder.final_block.0.weight": state["W_dec"], "encoder.final_block.0.bias": state["b_enc"]}
    path = saved(tmp_path / "oc.pt", other, "torch")
    convert(path, tmp_path / "b", ConvertSettings(sae_kind="batchtopk", threshold=0.3))
    assert float(import_sae(tmp_path / "b", kind="batchtopk").sae.threshold[0]) == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="is not empty"):
        convert(path, tmp_path / "b", ConvertSettings(sae_kind="relu"))
