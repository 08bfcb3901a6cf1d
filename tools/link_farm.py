"""Lay out build/typed/tiltscope as an installed package would be, out of links into the tree, for the type checker.

Type checkers do not run the import hook of an editable install, so to them `tiltscope.engine` does not exist. The layout is
read from pyproject.toml's package-dir: what is installed and what is checked cannot drift apart. Run from the repository root.
"""

import shutil
import tomllib
from pathlib import Path


def link(root: Path, farm: Path) -> None:
    """Lay `farm` out anew: every Python file of every room as a link in a real folder; checkers follow no linked folders."""
    package_dir: dict[str, str] = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ]
    rooms = {root / folder: farm.joinpath(*package.split(".")) for package, folder in package_dir.items()}
    shutil.rmtree(farm, ignore_errors=True)
    for room, target in rooms.items():
        for source in sorted(room.rglob("*.py*")):
            # A file belongs to the innermost room around it; bundles and caches hold none.
            inner = next(folder for folder in source.parents if folder in rooms)
            if inner == room and source.suffix in (".py", ".pyi") and "__pycache__" not in source.parts:
                link_path = target / source.relative_to(room)
                link_path.parent.mkdir(parents=True, exist_ok=True)
                link_path.symlink_to(source.resolve())


if __name__ == "__main__":
    link(Path.cwd(), Path("build/typed"))
