"""The errors that the operations raise. The whole tree, and who else raises what, is in tiltscope.engine.errors."""


class TiltscopeError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(TiltscopeError, ValueError):
    """A value, a name or a shape is not allowed."""


class RunnerError(TiltscopeError):
    """The runner asked for is not available here."""
