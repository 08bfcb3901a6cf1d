"""The public names are frozen, and `import tiltscope` and `tiltscope --help` stay light."""

import inspect
import subprocess
import sys

import pytest

import tiltscope

NAMES = (
    "Bundle",
    "Calibration",
    "Engine",
    "Explanation",
    "Feature",
    "Prior",
    "Samples",
    "__version__",
    "calibrate",
    "errors",
    "explain",
    "load",
    "sample",
    "tilt_weights",
)
SAMPLE = {
    "num": 8,
    "lam": None,
    "target_activation": None,
    "log_tilt": None,
    "lift": None,
    "solver": None,
    "steps": None,
    "grid": None,
    "guidance": None,
    "recurrence": 1,
    "travel_length": 1,
    "preset": "calibrated",
    "particles": 1,
    "seed": 0,
    "indices": None,
    "batch_size": None,
    "start": None,
    "start_sigma": 0.8,
    "guidance_interval": None,
    "calibration": "pool",
    "calibration_num": 256,
    "beyond_pool": False,
    "runner": "torch",
    "kernels": "auto",
    "device": "cpu",
    "graphs": "auto",
    "allow_parity_failure": False,
    "dtype": "float32",
    "vjp_chunk": None,
    "on_step": None,
}
HEAVY = ("torch", "numpy", "diffusers", "transformers", "pyarrow", "safetensors", "matplotlib", "PIL", "rich")


def keywords(function: object) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_public_names_are_frozen() -> None:
    assert tuple(sorted(tiltscope.__all__)) == tuple(sorted(NAMES))
    for name in NAMES:
        assert getattr(tiltscope, name) is not None


def test_an_unknown_name_lists_the_public_ones() -> None:
    with pytest.raises(AttributeError, match="public names: Bundle"):
        tiltscope.samples_of  # noqa: B018


def test_sample_keywords_and_defaults_are_frozen() -> None:
    assert keywords(tiltscope.sample) == SAMPLE
    assert list(inspect.signature(tiltscope.sample).parameters)[:2] == ["prior", "feature"]


def test_every_setting_of_the_config_is_a_keyword_of_sample() -> None:
    from dataclasses import fields

    from tiltscope.engine.config import ExplainConfig, SampleConfig

    assert {each.name: each.default for each in fields(SampleConfig)} == {
        name: default for name, default in SAMPLE.items() if name != "on_step"
    }
    assert {each.name for each in fields(ExplainConfig)} - {each.name for each in fields(SampleConfig)} == {
        "target_quantile",
        "target_z",
        "target_max_multiple",
    }


def test_other_signatures_are_frozen() -> None:
    assert list(inspect.signature(tiltscope.explain).parameters)[:2] == ["bundle", "feature"]
    assert list(keywords(tiltscope.Prior.__init__)) == ["shape", "name"]
    assert list(keywords(tiltscope.Feature.__init__)) == ["name"]
    assert keywords(tiltscope.calibrate) == {"log_tilt": "linear"}
    assert keywords(tiltscope.tilt_weights) == {"log_tilt": "linear"}


def test_the_error_tree_is_frozen() -> None:
    errors = tiltscope.errors
    tree = {
        "TiltscopeError": Exception,
        "ConfigError": errors.TiltscopeError,
        "BundleError": errors.TiltscopeError,
        "NonFiniteError": errors.TiltscopeError,
        "CalibrationError": errors.TiltscopeError,
        "RunnerError": errors.TiltscopeError,
        "BusyError": errors.TiltscopeError,
        "DeadlineError": errors.TiltscopeError,
        "ExportError": errors.TiltscopeError,
        "ParityError": errors.TiltscopeError,
    }
    assert sorted(errors.__all__) == sorted(tree)
    assert all(issubclass(getattr(errors, name), parent) for name, parent in tree.items())
    assert issubclass(errors.ConfigError, ValueError)


@pytest.mark.parametrize(
    "code",
    [
        "import tiltscope",
        "import tiltscope; tiltscope.errors.ConfigError",
        "from tiltscope.engine.cli.main import run; assert run(['--help']) == 0",
        "from tiltscope.engine.cli.main import run; assert run(['explain', '--help']) == 0",
        "from tiltscope.engine.cli.main import run; assert run(['sample', '--nope']) == 2",
        "from tiltscope.engine.cli.main import run; assert run(['features', '--help']) == 0",
        "from tiltscope.engine.cli.main import run; assert run(['calibrate', '--help']) == 0",
        "from tiltscope.engine.cli.main import run; assert run(['doctor', '--help']) == 0",
    ],
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    report = f"import sys; print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
