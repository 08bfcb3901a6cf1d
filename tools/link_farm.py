"""Lay out build/typed/tiltscope as an installed package would be, out of links into the tree, for the type checker.

Type checkers do not run the import hook of an editable install, so to them `tiltscope.engine` does not exist. The layout is
read from pyproject.toml's package-dir: what is installed and what is checked cannot drift apart. Run from the repository root.
"""

import shutil
import tomllib
from pathlib import Path

FARM = Path("build/typed")


def main() -> None:
    """Remove the old farm and link every entry of every top room, so that a room never holds another room's folder."""
    package_dir: dict[str, str] = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    rooms = {Path(folder) for folder in package_dir.values()}
    shutil.rmtree(FARM, ignore_errors=True)
    for package, folder in package_dir.items():
        target = FARM.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted(Path(folder).iterdir()):
            if entry not in rooms and entry.name not in ("__pycache__", "bundles"):
                (target / entry.name).symlink_to(entry.resolve())


if __name__ == "__main__":
    main()
