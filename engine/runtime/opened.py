"""What an engine makes of a model file before it can run it, kept: the next process opens that instead.

    CACHE/<key>/...    whatever `make` wrote; described and checked like every artefact, without a self-test of its own

Optimising a graph takes an engine seconds at every start, the same seconds each time. What comes out is for one version of the
engine, one processor and one number of threads: all of them are in the key, with the hashes of the file and of its weights. It
is no more trusted than the file itself: the step that runs it passes the gate like any other. Knows files; knows no engine.
"""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tiltscope.engine.runtime.artefact import file_hashes, here, obtain
from tiltscope.engine.runtime.cpu import cpu_features


def opened_before(path: Path, engine: str, settings: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder of what `make` writes for the graph at `path`, a file of an artefact; made now where the cache has none.

    engine: the distribution whose version counts. Raises what `obtain` and `make` raise.
    """
    hashes = file_hashes(path.parent)
    # The graph itself, and whatever lies beside it under its name: weights beyond what one file can hold.
    of = {name: digest for name, digest in hashes.items() if name.split(".")[0] == path.stem}
    key = {
        "kind": f"{engine} {path.stem}",
        "of": of,
        "engine": version(engine),
        "cpu": cpu_features(),
        "settings": dict(settings),
        **here(),
    }
    return obtain(key, make).folder
