"""Claims of the manifest: plain JSON whatever the engine put in, and a command that means the same run."""

import json
import shlex
from typing import Any

import numpy as np
import pytest
import torch

from tiltscope.engine.cli.explain import Arguments as ExplainArguments
from tiltscope.engine.cli.parse import parse
from tiltscope.engine.cli.sample import Arguments as SampleArguments
from tiltscope.engine.config import ExplainConfig, SampleConfig
from tiltscope.engine.errors import ConfigError
from tiltscope.engine.report import manifest as manifests

RUN = "1f" * 32


def test_anything_the_engine_measures_becomes_plain_json() -> None:
    given: dict[str, Any] = {
        "identity": RUN,
        "nan": float("nan"),
        "infinite": np.float32("inf"),
        "array": np.array([1.5, np.nan]),
        "tensor": torch.tensor([1, 2]),
        "scalar": torch.tensor(True),
        "pair": (1, None),
        "seed": 2**64 - 1,
    }
    whole = manifests.complete(given)
    read = json.loads(manifests.dump(whole))
    assert read == whole
    assert read["nan"] is read["infinite"] is None
    assert read["array"] == [1.5, None]
    assert (read["tensor"], read["scalar"], read["pair"], read["seed"]) == ([1, 2], True, [1, None], 2**64 - 1)
    assert read["schema_version"] == 1
    assert read["versions"]["torch"] == torch.__version__
    assert manifests.complete(whole) == whole


@pytest.mark.parametrize("identity", [None, "abc", RUN.upper(), 7])
def test_a_manifest_without_an_identity_is_refused(identity: Any) -> None:
    with pytest.raises(ConfigError, match="identity must be 64 hex digits"):
        manifests.complete({"identity": identity})


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="no place in JSON"):
        manifests.complete({"identity": RUN, "thing": object()})


CONFIGS: list[dict[str, Any]] = [
    {},
    {"num": 64, "seed": 2**64 - 1, "target_quantile": 0.999},
    {"lam": -2.5, "solver": "ddim(eta=0.5)", "steps": 20, "grid": "angle(alpha_min=0.01)"},
    {"lam": (-1.0, 2.0), "num": 2, "indices": (5, 2), "guidance_interval": (0.1, 0.9)},
    {"target_activation": -1.5, "log_tilt": "capped(cap=3.0)", "batch_size": 4, "dtype": "float64"},
]


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("feature", ["blocks.5:sae:137", "norm:cls:7", "blocks.5:direction:my file (1).npy@3,4"])
def test_the_command_to_repeat_it_is_the_same_run(settings: dict[str, Any], feature: str) -> None:
    for command, kind, arguments in (
        ("explain", ExplainConfig, ExplainArguments),
        ("sample", SampleConfig, SampleArguments),
    ):
        if command == "sample":
            settings = {k: v for k, v in settings.items() if k != "target_quantile"} or {"lam": 1.0}
        config = kind(**settings).resolved()
        text = manifests.repeat_command(
            {"command": command, "feature": feature, "config": config.to_json(), "bundle": {"name": "emoji64"}}
        )
        assert text is not None
        program, first, *words = shlex.split(text)
        assert (program, first) == ("tiltscope", command)
        read = parse(arguments, words, prog=f"tiltscope {command}")
        assert read.feature == feature
        assert read.bundle == "emoji64"
        assert read.config.resolved() == config


def test_another_bundle_is_named() -> None:
    config = ExplainConfig().to_json()
    text = manifests.repeat_command(
        {"command": "explain", "feature": "norm:cls:7", "config": config, "bundle": {"name": "my bundle"}}
    )
    assert text is not None
    assert parse(ExplainArguments, shlex.split(text)[2:], prog="tiltscope explain").bundle == "my bundle"


@pytest.mark.parametrize(
    "changes", [{"feature": "blocks.5:sae:1 * 2.0 - blocks.5:sae:3"}, {"bundle": None}, {"command": None}]
)
def test_what_was_made_in_python_has_no_command(changes: dict[str, Any]) -> None:
    given = {"command": "explain", "feature": "norm:cls:7", "config": {}, "bundle": {"name": "emoji64"}} | changes
    assert manifests.repeat_command(given) is None
