"""What every test stands on: one thread, derandomised laws in CI, shards of the slow tier, markers that say why they skip."""

import importlib.util
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Before torch is imported anywhere: the order of a sum depends on the number of threads.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from beartype import BeartypeConf, beartype  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# Shapes and types in signatures are checked while tests run. Not in the rooms that are called with what a user wrote (tilt,
# sample, kernels.dispatch, the public Prior and Feature): there a wrong value must meet our own refusal, which has tests of its
# own; nor in Triton kernels, which are compiled from their source.
CHECKED = tuple(
    f"tiltscope.{room}"
    for room in (
        "kernels.philox",
        "kernels.reference",
        "kernels.reference_feature",
        "kernels.reference_preprocess",
        "engine.sampler",
        "engine.runtime",
        "engine.prior.network",
        "engine.feature.readout",
        "engine.feature.trunk",
        "engine.feature.dinov2",
        "engine.feature.sae",
    )
)
_checker = ModuleType("shape_checker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]  an int is a float, as for pyright
sys.modules[_checker.__name__] = _checker
install_import_hook(CHECKED, "shape_checker.check")

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def _load(name: str, path: Path) -> ModuleType:
    """A module from a file, without the repository root on sys.path: its kernels/ would shadow another distribution."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# The scripts in tools/ import each other by bare name. Last on the path, so that they shadow nothing.
sys.path.append(str(ROOT / "tools"))


# Imported by bare name: tiny networks in the real formats, plain transcriptions of what no library here owns, samples to write.
_load("tiny_models", ROOT / "tests" / "tiny_models.py")
_load("edm_originals", ROOT / "tests" / "edm_originals.py")
_load("written_samples", ROOT / "tests" / "written_samples.py")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with random weights in the real layout and formats: a few pictures, a few thousand parameters."""
    return _load("tiny_bundle", ROOT / "tests" / "tiny_bundle.py").build_tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def build_twin() -> Callable[[Path, str], Path]:
    """Writes a tiny twin of a real system: tests/twin_bundle.py names them."""
    if "tiny_bundle" not in sys.modules:
        _load("tiny_bundle", ROOT / "tests" / "tiny_bundle.py")
    return _load("twin_bundle", ROOT / "tests" / "twin_bundle.py").build_twin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="K/N", help="only the tests whose name falls into shard K (0 .. N-1) of N")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if (reason := _gpu_reason(item) or _browser_reason(item)) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    if (shard := config.getoption("--shard")) is None:
        return
    which, _, num = str(shard).partition("/")
    if not (which.isdecimal() and num.isdecimal() and int(which) < int(num)):
        raise pytest.UsageError(f"--shard: got {shard!r}, allowed is K/N with K from 0 to N-1")
    # By file, so that a module's fixtures are built once; by checksum, so that a new file moves no other.
    mine = [
        each for each in items if zlib.crc32(each.path.relative_to(ROOT).as_posix().encode()) % int(num) == int(which)
    ]
    config.hook.pytest_deselected(items=[each for each in items if each not in mine])
    items[:] = mine


def _gpu_reason(item: pytest.Item) -> str | None:
    """@pytest.mark.gpu("what is claimed", instead="tests/of/a/stand_in.py")"""
    if (marker := item.get_closest_marker("gpu")) is None:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    instead = marker.kwargs.get("instead", "nothing")
    return f"needs a CUDA device, torch {torch.__version__} sees none; shown here instead: {instead}"


def _browser_reason(item: pytest.Item) -> str | None:
    if item.get_closest_marker("browser") is None:
        return None
    if importlib.util.find_spec("playwright") is None:
        return "needs playwright: pip install 'tiltscope[dev]'"
    if shutil.which("chromium") is None:
        return "needs Chromium: apt-get install chromium"
    return None
