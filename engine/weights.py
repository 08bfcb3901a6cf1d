"""Weights into a module, or one message that says what is wrong with them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from tiltscope.engine.errors import BundleError

_SHOWN = 3


def assign_weights(
    module: nn.Module, tensors: Mapping[str, Tensor], path: Path, *, extra: tuple[str, ...] = ()
) -> None:
    """The tensors become `module`'s parameters and persistent buffers, name by name; none is left out and none is left over.

    extra: names of the file that have no place in the module; whatever is in it is an error.
    Raises BundleError naming the file and the first few names that are missing, of another shape, or not known.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted] + list(extra)
    other = [name for name in wanted if name in tensors and tensors[name].shape != wanted[name].shape]
    if missing or unknown or other:
        told = [
            _first("missing", missing, str),
            _first(
                "of another shape",
                other,
                lambda name: f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}",
            ),
            _first("not known", unknown, str),
        ]
        raise BundleError(
            f"{path} does not hold the weights that config.json describes: {'; '.join(each for each in told if each)}"
        )
    module.load_state_dict(dict(tensors), assign=True)


def _first(what: str, names: list[str], describe: Callable[[str], str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what} ({', '.join(describe(name) for name in sorted(names)[:_SHOWN])}{more})"
