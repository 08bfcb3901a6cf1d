"""tiltscope: what a vision feature means, as a distribution of images.

The public names below are loaded on first use, so `import tiltscope` needs neither torch nor numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltscope.engine import errors
    from tiltscope.engine.batching.engine import Engine
    from tiltscope.engine.bundle import Bundle, load
    from tiltscope.engine.explain import Explanation, explain
    from tiltscope.engine.feature.feature import Feature
    from tiltscope.engine.prior.prior import Prior
    from tiltscope.engine.sample import sample
    from tiltscope.engine.samples import Samples
    from tiltscope.engine.tilt.calibrate import Calibration, calibrate, tilt_weights

__version__ = "0.1.0"

_HOME = {
    "Bundle": "bundle",
    "Calibration": "tilt.calibrate",
    "Engine": "batching.engine",
    "Explanation": "explain",
    "Feature": "feature.feature",
    "Prior": "prior.prior",
    "Samples": "samples",
    "calibrate": "tilt.calibrate",
    "explain": "explain",
    "load": "bundle",
    "sample": "sample",
    "tilt_weights": "tilt.calibrate",
}

__all__ = [
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
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("tiltscope.errors")
    if name not in _HOME:
        raise AttributeError(f"module 'tiltscope' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(import_module(f"tiltscope.engine.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
