"""Weights in one file or several become one file; what is wrong with an index or a header is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiltscope.engine.bundling.weights import copy_weights, weight_files
from tiltscope.engine.errors import BundleError

NAME = "model.safetensors"


def tensors(*names):
    generator = torch.Generator().manual_seed(len(names))
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64)
    return {name: (10 * torch.randn(3, at + 1, generator=generator)).to(kinds[at % 4]) for at, name in enumerate(names)}


def split(folder, **files):
    """Each keyword a file's tensors; the index that belongs to them."""
    table = {}
    for stem, held in files.items():
        save_file(held, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        table |= dict.fromkeys(held, f"{stem}.safetensors")
    write_index(folder, table)


def write_index(folder, table):
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": table}))


def test_several_files_become_one_with_the_same_tensors(tmp_path):
    split(tmp_path, one=tensors("b", "a", "c"), two=tensors("e", "d"))
    copy_weights(weight_files(tmp_path, NAME), tmp_path / "out/model.safetensors")
    merged = load_file(tmp_path / "out/model.safetensors")
    expected = tensors("b", "a", "c") | tensors("e", "d")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor)


def test_one_file_is_copied_byte_by_byte(tmp_path):
    save_file(tensors("a", "b"), tmp_path / NAME)
    copy_weights(weight_files(tmp_path, NAME), tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / NAME).read_bytes()


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x.bin"]
)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(tensors("a"), tmp_path / "secret.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(BundleError, match=r"only \.safetensors files of its own folder"):
        weight_files(folder, NAME)


def test_an_index_of_a_file_that_is_not_there_and_one_without_a_map(tmp_path):
    write_index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(BundleError, match=r"'one.safetensors', which is not there"):
        weight_files(tmp_path, NAME)
    (tmp_path / f"{NAME}.index.json").write_text('{"weight_map": ["one.safetensors"]}')
    with pytest.raises(BundleError, match="weight_map"):
        weight_files(tmp_path, NAME)


def test_two_files_with_one_name_are_refused(tmp_path):
    split(tmp_path, one=tensors("a"), two=tensors("a", "b"))
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with pytest.raises(BundleError, match=r"two files of .* hold the tensor 'a'"):
        copy_weights(weight_files(tmp_path, NAME), tmp_path / "out.safetensors")


@pytest.mark.parametrize("lie", ["beyond the end", "overlapping", "wrong size", "huge header"])
def test_a_header_that_lies_is_refused(tmp_path, lie):
    import struct

    size = 10**12 if lie == "beyond the end" else 24
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, size]}}
    if lie == "overlapping":
        header["b"] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}
    if lie == "wrong size":
        header["a"]["shape"] = [2, 4]
    text = json.dumps(header).encode()
    length = 2**62 if lie == "huge header" else len(text)
    (tmp_path / NAME).write_bytes(struct.pack("<Q", length) + text + bytes(32 if lie == "overlapping" else 24))
    with pytest.raises(BundleError, match="cannot be read"):
        weight_files(tmp_path, NAME)


def test_pickled_weights_are_named_with_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(BundleError, match=r"pytorch_model.bin is no safetensors file: `tiltscope convert`"):
        weight_files(tmp_path, NAME)
