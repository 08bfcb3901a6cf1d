"""The parts of a bundle's feature: where poolings look, the autoencoder's rows, a direction from a file."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiltscope
from tiltscope.engine.errors import BundleError, ConfigError
from tiltscope.engine.feature.direction import load_direction
from tiltscope.engine.feature.poolings import central_half, pooling_tensors
from tiltscope.engine.feature.sae import load_sae


@pytest.mark.parametrize(
    ("size", "kept"), [(1, (0, 0)), (2, (0, 1)), (5, (1, 3)), (8, (2, 5)), (14, (3, 10)), (16, (4, 11))]
)
def test_the_central_half_of_an_axis(size, kept):
    rows = list(range(size))[central_half(size)]
    assert (rows[0], rows[-1]) == kept


def test_poolings_look_where_they_say():
    def where(pooling):
        mixture, mask = pooling_tensors(pooling, grid=(4, 6), num_prefix_tokens=3)
        return [round(float(m), 3) for m in mixture], torch.nonzero(mask).flatten().tolist()

    patches = list(range(3, 27))
    assert where("max") == ([1.0, 0.0, 0.0], patches)
    assert where("mean") == ([0.0, 1.0, 0.0], patches)
    assert where("lse") == ([0.0, 0.0, 1.0], patches)
    assert where("centre") == ([0.7, 0.3, 0.0], [3 + 6 * y + x for y in (1, 2) for x in (1, 2, 3, 4)])
    assert where("3,5")[1] == [26]
    assert where(None)[1] == [0]


@pytest.mark.parametrize("pooling", ["4,0", "0,6"])
def test_a_position_off_the_grid_is_refused(pooling):
    with pytest.raises(ConfigError, match="y 0 to 3, x 0 to 5"):
        pooling_tensors(pooling, grid=(4, 6), num_prefix_tokens=3)


def test_all_latents_at_once_are_each_latent_alone(tiny_bundle):
    bundle = tiltscope.load(tiny_bundle)
    x0 = bundle.pool.x0(range(5))
    together = bundle.latents(x0, "blocks.1")
    assert together.shape == (5, 24)
    for j in (0, 7, 23):
        alone = bundle.feature(f"blocks.1:sae:{j}").activation(x0)
        torch.testing.assert_close(together[:, j], alone, rtol=1e-6, atol=1e-6)
    assert (together[:, :23] > 0).any(0).all()
    assert not together[:, 23].any()


def test_an_autoencoder_is_jumprelu_of_its_encoder(tiny_bundle):
    """The normal form, token by token: what the readout computes is what the file says."""
    from safetensors.torch import load_file

    bundle = tiltscope.load(tiny_bundle)
    tensors = load_file(tiny_bundle / "sae/sae.safetensors")
    x0 = bundle.pool.x0([3])
    tokens = bundle.trunk("blocks.1")(x0)[0, 5:]
    pre = tokens @ tensors["encoder.weight"][4] + tensors["encoder.bias"][4]
    latent = torch.where(pre > tensors["threshold"][4], pre, 0.0).view(8, 8)
    torch.testing.assert_close(bundle.feature("blocks.1:sae:4").heat_map(x0)[0], latent, rtol=1e-5, atol=1e-5)


def tensors(**changes):
    return {"encoder.weight": torch.ones(4, 3), "encoder.bias": torch.ones(4), "threshold": torch.ones(4)} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"encoder.weight": torch.ones(4, 3)}, "encoder.bias"),
        (tensors(threshold=torch.ones(3)), r"threshold \[3\]"),
        (tensors(**{"encoder.weight": torch.ones(4)}), r"encoder.weight \[4\]"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(tmp_path, content, message):
    save_file(content, tmp_path / "sae.safetensors")
    with pytest.raises(BundleError, match=message):
        load_sae(tmp_path / "sae.safetensors")


def write(path, vector):
    if path.suffix == ".npy":
        np.save(path, vector.numpy(), allow_pickle=False)
    else:
        save_file({"direction": vector}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_direction_is_read_as_it_is(tiny_bundle, tmp_path, suffix):
    bundle = tiltscope.load(tiny_bundle)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / f"a:b{suffix}", vector)
    feature = bundle.feature(f"blocks.1:direction:{path}@1,2")
    x0 = bundle.pool.x0([0, 9])
    expected = bundle.trunk("blocks.1")(x0)[:, 5 + 8 + 2] @ vector
    torch.testing.assert_close(feature.activation(x0), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(*feature.activation_and_drive(x0))


def test_a_directions_identity_is_its_numbers(tmp_path):
    one, same, other = (torch.arange(1.0, 5), torch.arange(1.0, 5).double(), torch.arange(1.0, 5) * 2)
    digest = [load_direction(write(tmp_path / f"{i}.npy", v), width=4)[1] for i, v in enumerate((one, same, other))]
    assert digest[0] == digest[1] != digest[2]


@pytest.mark.parametrize(
    "vector",
    [torch.ones(5), torch.ones(2, 2), torch.zeros(4), torch.tensor([1.0, 2, 3, float("nan")]), torch.arange(4)],
    ids=["too long", "a matrix", "zero", "NaN", "integers"],
)
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_direction_that_is_no_vector_of_the_trunk_is_refused(tmp_path, vector, suffix):
    with pytest.raises(ConfigError, match="direction"):
        load_direction(write(tmp_path / f"v{suffix}", vector), width=4)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_direction_is_never_unpickled(tmp_path):
    np.save(tmp_path / "v.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_direction(str(tmp_path / "v.npy"), width=1)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["absent.npy", "absent.safetensors"])
def test_a_direction_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(ConfigError, match=name):
        load_direction(str(tmp_path / name), width=4)


def test_a_truncated_direction_is_refused(tmp_path):
    for suffix in (".npy", ".safetensors"):
        path = tmp_path / f"v{suffix}"
        write(path, torch.ones(4))
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(ConfigError, match="cannot be read"):
            load_direction(str(path), width=4)
