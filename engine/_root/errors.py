"""The public home of the error tree; see tiltscope.engine.errors."""

from tiltscope.engine.errors import (
    BundleError,
    BusyError,
    CalibrationError,
    ConfigError,
    DeadlineError,
    ExportError,
    NonFiniteError,
    ParityError,
    RunnerError,
    TiltscopeError,
)

__all__ = [
    "BundleError",
    "BusyError",
    "CalibrationError",
    "ConfigError",
    "DeadlineError",
    "ExportError",
    "NonFiniteError",
    "ParityError",
    "RunnerError",
    "TiltscopeError",
]
