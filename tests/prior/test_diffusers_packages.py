"""A start imports the one model it needs, and the packages are whole for whoever asks for another."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest

from tiltscope.engine.prior import diffusers_packages
from tiltscope.engine.prior.diffusers_packages import defer_siblings

# One process, because torch and diffusers take seconds to import: a package each, and diffusers' own top level.
REAL = """
import sys
import diffusers
import tiltscope
tiltscope.load("emoji64").prior
assert "diffusers.models.unets.unet_2d" in sys.modules
assert not [name for name in sys.modules if name.startswith("diffusers.models.") and "3d" in name]
from diffusers.models.unets import UNet1DModel, UNet2DModel
assert isinstance(tiltscope.load("emoji64").prior.network.network, UNet2DModel)
import diffusers.models.transformers as package
from diffusers import AuraFlowTransformer2DModel, AutoencoderKL
assert package.AuraFlowTransformer2DModel is AuraFlowTransformer2DModel
assert AutoencoderKL is diffusers.models.autoencoders.AutoencoderKL
"""

# What a start of `explain` reads, and then torch's compiler, for whoever wants it.
LEAN = """
import sys
import torch
import tiltscope
bundle = tiltscope.load("emoji64")
bundle.prior
bundle.pool.activations(bundle.feature("blocks.5:sae:1169"))
assert not {"torch._dynamo", "pandas"} & set(sys.modules), "seconds of a start"
assert torch.compile(torch.sin, backend="eager")(torch.zeros(1)).item() == 0.0
assert "torch._dynamo" in sys.modules
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Name of a deferred package of two models, one of which is imported."""
    folder = tmp_path / "many" / "models"
    folder.mkdir(parents=True)
    (tmp_path / "many" / "__init__.py").write_text("")
    (folder / "__init__.py").write_text("from .one import One\nfrom .two import Two\n")
    (folder / "one.py").write_text("class One: ...\n")
    (folder / "two.py").write_text("from .one import One\nclass Two(One): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(diffusers_packages, "PACKAGES", ("many.models", "many.absent"))
    before = set(sys.modules)
    defer_siblings()
    import_module("many.models.one")
    assert "many.models.two" not in sys.modules
    yield "many.models"
    for name in set(sys.modules) - before:
        if name.startswith("many"):
            del sys.modules[name]


def test_a_bundles_prior_is_loaded_without_the_other_models_and_they_are_there_when_asked_for():
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_start_reads_neither_torchs_compiler_nor_pandas():
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from many.models import Two",
        "from many.models import One, Two",
        "from many.models import *",
        "import many.models\nTwo = many.models.Two",
        "from many import models\nTwo = models.Two",
        "from many.models.two import Two",
        "from many.models import two\nTwo = two.Two",
    ],
)
def test_who_asks_for_another_gets_it_and_the_same_one_as_before(package, code):
    one = sys.modules["many.models.one"].One
    found = {}
    exec(code, found)
    assert found["Two"].__mro__[1] is one
    assert sys.modules[package].One is one


def test_a_look_through_all_modules_imports_nothing(package):
    assert getattr(sys.modules[package], "__wrapped__", None) is None
    assert "many.models.two" not in sys.modules


def test_a_name_that_no_package_has_is_an_error_of_the_package(package):
    for _ in range(2):
        with pytest.raises(AttributeError, match=r"module 'many.models' has no attribute 'Three'"):
            _ = sys.modules[package].Three


def test_a_package_that_is_known_stays_as_it_is(package):
    before = sys.modules[package]
    defer_siblings()
    assert sys.modules[package] is before


def test_a_module_left_for_later_is_unknown_to_this_thread_alone(tmp_path, monkeypatch):
    (tmp_path / "wanted_later.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    with diffusers_packages._unknown("wanted_later"):
        with pytest.raises(ModuleNotFoundError, match="wanted_later"):
            import_module("wanted_later")
        with ThreadPoolExecutor(1) as other:
            assert other.submit(import_module, "wanted_later").result().value == 3
    del sys.modules["wanted_later"]
    assert import_module("wanted_later").value == 3
    del sys.modules["wanted_later"]
