"""The public home of the error tree; see tiltscope.engine.errors."""

from tiltscope.engine.errors import (
    BundleError,
    CalibrationError,
    ConfigError,
    ExportError,
    NonFiniteError,
    ParityError,
    RunnerError,
    TiltscopeError,
)

__all__ = [
    "BundleError",
    "CalibrationError",
    "ConfigError",
    "ExportError",
    "NonFiniteError",
    "ParityError",
    "RunnerError",
    "TiltscopeError",
]
