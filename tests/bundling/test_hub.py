"""A name on the Hub: what a person must do is said. There is no network here: the Hub's answers are simulated at its client."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from tiltscope.engine.bundling.hub import PATTERNS, local_folder
from tiltscope.engine.bundling.make import find
from tiltscope.engine.bundling.settings import BundleSettings
from tiltscope.engine.errors import BundleError, ConfigError

NAME = "facebook/dinov3-vitl16-pretrain-lvd1689m"


def answer(monkeypatch, error):
    def snapshot_download(name, **options):
        assert name == NAME
        assert options == {"allow_patterns": list(PATTERNS)}
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def http(kind, monkeypatch):
    """The client's own error without a response behind it."""
    error = kind.__new__(kind)
    Exception.__init__(error, "403 Client Error")
    return error


def test_a_gated_model_says_what_to_accept_and_how_to_log_in(monkeypatch):
    answer(monkeypatch, http(errors.GatedRepoError, monkeypatch))
    with pytest.raises(ConfigError) as told:
        local_folder(Path(NAME), "trunk")
    for words in (f"https://huggingface.co/{NAME}", "accept its licence", "hf auth login", "HF_TOKEN"):
        assert words in str(told.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "neither a folder here nor a model on the Hub"),
        (errors.LocalEntryNotFoundError, f"hf download {NAME}"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE=1"),
    ],
)
def test_other_answers_say_what_to_do(monkeypatch, kind, words):
    answer(monkeypatch, http(kind, monkeypatch))
    with pytest.raises(ConfigError) as told:
        local_folder(Path(NAME), "prior")
    assert words in str(told.value)
    assert f"prior {NAME}" in str(told.value)


def test_a_failure_on_the_way_is_not_the_requests_fault(monkeypatch):
    answer(monkeypatch, http(errors.HfHubHTTPError, monkeypatch))
    with pytest.raises(BundleError, match="could not be fetched: 403 Client Error; try again"):
        local_folder(Path(NAME), "sae")


def test_folders_and_what_is_fetched_are_given_as_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path))
    assert local_folder(Path(NAME), "trunk") == tmp_path
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    (tmp_path / "owner/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert local_folder(Path("owner/name"), "trunk") == Path("owner/name")
    for path in ("/abs/olute", "one", "a/b/c", "../up"):
        assert local_folder(Path(path), "trunk") == Path(path)


def test_bundle_asks_for_every_part(monkeypatch, tiny_bundle, tmp_path):
    answer(monkeypatch, http(errors.GatedRepoError, monkeypatch))
    parts = {name: tiny_bundle / name for name in ("prior", "trunk", "sae")}
    for part in parts:
        settings = BundleSettings(
            **(parts | {part: Path(NAME)}), pool=tmp_path, out=tmp_path / "out", pixel_unshuffle=4
        )
        with pytest.raises(ConfigError, match=f"{part} {NAME} is gated"):
            find(settings)
