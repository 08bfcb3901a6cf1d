"""Weights between two: exact at both ends, half way in the middle, and what a bundle is then made from."""

import json
from pathlib import Path

import pytest
import torch
from between import Config, between, main
from make_bundle import export_prior
from prior_network import build_unet, export, load_unet


def test_both_ends_and_half_way() -> None:
    start, end = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, -2.0])}
    found = [between(start, end, share)["w"].tolist() for share in (0.0, 0.5, 1.0)]
    assert found == [[1.0, 2.0], [2.0, 0.0], [3.0, -2.0]]


def test_a_bundle_takes_it_as_any_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start, end = build_unet(), build_unet()
    export(start, tmp_path / "start")
    (tmp_path / "end").mkdir()
    state = {"modules": {"average": end.state_dict()}, "facts": {"step": 7, "seconds": 1.5}}
    torch.save(state, tmp_path / "end/checkpoint.pt")
    (tmp_path / "end/log.jsonl").write_text('{"step": 7, "loss": 0.5}\n{"done": true, "step": 7, "batch": 32}\n')
    main(Config(start=tmp_path / "start", end=tmp_path / "end", share=0.5, out=tmp_path / "out"))
    facts, _ = export_prior(tmp_path / "out/checkpoint.pt", tmp_path / "prior")
    assert facts == {"step": 7, "seconds": 1.5}
    assert json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[-1])["done"]
    before = load_unet(tmp_path / "start").state_dict()
    for name, value in load_unet(tmp_path / "prior").state_dict().items():
        expected = 0.5 * (before[name] + end.state_dict()[name])
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)


def test_a_share_beyond_the_ends_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"got 1\.5, allowed"):
        main(Config(start=tmp_path, end=tmp_path, share=1.5, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
