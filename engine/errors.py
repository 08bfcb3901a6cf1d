"""Everything that tiltscope raises on purpose.

    TiltscopeError
    ├── ConfigError       the request is wrong: a value, a name, a shape (also a ValueError)
    ├── BundleError       files are missing, damaged or not what their description says
    ├── CalibrationError  no tilt reaches the wanted activation
    ├── NonFiniteError    every sample became non-finite
    ├── RunnerError       the runner asked for cannot run here
    ├── BusyError         the batcher has no room for another request now
    ├── DeadlineError     a request's time was over before its samples were drawn (also a TimeoutError)
    ├── ExportError       a graph cannot be exported
    └── ParityError       an exported graph differs from its reference

Every message says what was got, what is allowed and what to do. On the command line ConfigError, BundleError,
CalibrationError and RunnerError exit with 2 (the request cannot be met here), the others with 1.

Three of them are raised by the operations in tiltscope.kernels, which may not import this room, and are defined there.
"""

from tiltscope.kernels.errors import ConfigError, RunnerError, TiltscopeError

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


class BundleError(TiltscopeError):
    """A bundle's files are missing, damaged, or not what bundle.json says."""


class CalibrationError(TiltscopeError):
    """The wanted activation cannot be reached, or the activations do not vary."""


class NonFiniteError(TiltscopeError):
    """No sample stayed finite."""


class BusyError(TiltscopeError):
    """The batcher has no room for another request now."""


class DeadlineError(TiltscopeError, TimeoutError):
    """A request's time was over before its samples were drawn."""


class ExportError(TiltscopeError):
    """A graph cannot be exported."""


class ParityError(TiltscopeError):
    """An exported graph does not reproduce its reference."""
