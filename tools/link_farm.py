"""Lay out build/typed/tiltscope as an installed package would be, out of links into the tree, for the type checker.

Type checkers do not run the import hook of an editable install, so to them `tiltscope.engine` does not exist. The layout is
read from pyproject.toml's package-dir: what is installed and what is checked cannot drift apart. Run from the repository root.
"""

import shutil
import tomllib
from pathlib import Path


def link(root: Path, farm: Path) -> None:
    """Lay `farm` out anew: every entry of every room is a link, and no room holds another room's folder."""
    package_dir: dict[str, str] = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-dir"
    ]
    rooms = {root / folder for folder in package_dir.values()}
    shutil.rmtree(farm, ignore_errors=True)
    for package, folder in package_dir.items():
        target = farm.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted((root / folder).iterdir()):
            if entry not in rooms and entry.name not in ("__pycache__", "bundles"):
                (target / entry.name).symlink_to(entry.resolve())


if __name__ == "__main__":
    link(Path.cwd(), Path("build/typed"))
