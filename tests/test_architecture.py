"""The direction of imports, what may be imported where, and that the packages listed are the packages there are."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = sorted({folder.split("/")[0] for folder in SETUPTOOLS["package-dir"].values()})
HEAVY = {"torch", "numpy", "diffusers", "transformers", "safetensors", "pyarrow", "matplotlib", "PIL", "jaxtyping"}
# Read by --help and by `import tiltscope`: nothing heavy at import time.
LIGHT = (
    "engine/errors.py",
    "engine/choice.py",
    "engine/config.py",
    "engine/cli",
    "engine/feature/address.py",
    "engine/runtime/runners.py",
    "engine/_root",
)
# What an embedding without torch uses.
NUMPY_ONLY = (
    "engine/sampler/plan.py",
    "engine/sampler/row.py",
    "engine/sampler/solvers.py",
    "engine/sampler/grids.py",
    "engine/sampler/noise.py",
    "engine/runtime/schedule.py",
    "engine/tilt/calibrate.py",
)


def sources(*places: str) -> list[Path]:
    found = [
        each for place in places for each in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
    ]
    return sorted(each for each in found if "bundles" not in each.parts)


def imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Dotted names that a file imports; `at_import_time` leaves out function bodies and `if TYPE_CHECKING`."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        elif at_import_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for each in node.orelse:
                yield from visit(each)
        else:
            for each in ast.iter_child_nodes(node):
                yield from visit(each)

    yield from visit(ast.parse(path.read_text()))


def tops(path: Path, *, at_import_time: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, at_import_time=at_import_time)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_reader_of_imports_sees_what_it_should(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\nelse:\n    import f\n"
        "def g():\n    import h\nclass I:\n    import j\n"
    )
    assert set(imports(source)) == {"a.b", "c", "e", "f", "h", "j"}
    assert set(imports(source, at_import_time=True)) == {"a.b", "c", "f", "j"}


@pytest.mark.parametrize("path", sources("kernels"), ids=name_of)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    outside = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    # jaxtyping: annotations, which the test run checks.
    assert {name.split(".")[0] for name in outside} <= {"torch", "triton", "jaxtyping", "tiltscope"}
    assert all(name.startswith("tiltscope.kernels") for name in outside if name.startswith("tiltscope"))


@pytest.mark.parametrize("path", sources("kernels", "engine"), ids=name_of)
def test_nothing_imports_export(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("tiltscope.export")]


@pytest.mark.parametrize("path", sources(*ROOMS, "tests", "benchmarks", "tools"), ids=name_of)
def test_rooms_are_imported_by_their_full_name(path: Path) -> None:
    # `import kernels` works where the repository root is on sys.path, and there it shadows a distribution of that name.
    assert not tops(path) & set(ROOMS)
    assert not [name for name in imports(path) if name.startswith(".")]


@pytest.mark.parametrize("path", sources(*LIGHT), ids=name_of)
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    assert not tops(path, at_import_time=True) & HEAVY


@pytest.mark.parametrize("path", [each for each in sources(*NUMPY_ONLY) if each.exists()], ids=name_of)
def test_tables_noise_and_calibration_need_numpy_only(path: Path) -> None:
    assert "torch" not in tops(path)


@pytest.mark.parametrize("path", sources(*ROOMS), ids=name_of)
def test_what_the_engine_imports_is_installed_with_it(path: Path) -> None:
    """A distribution that only the checks install would be missing on a user's machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *(each for name, needs in extras.items() if name != "dev" for each in needs)]
    distributions = {re.split(r"[^\w-]", each)[0].lower() for each in named}
    modules = {{"pillow": "PIL", "scikit-learn": "sklearn"}.get(each, each.replace("-", "_")) for each in distributions}
    # jinja2 brings markupsafe: the page's own escaping.
    foreign = tops(path) - set(sys.stdlib_module_names) - {"tiltscope", "markupsafe"}
    assert foreign <= modules


def test_every_package_is_listed_and_every_listed_package_exists() -> None:
    package_dir: dict[str, str] = SETUPTOOLS["package-dir"]
    by_folder = {folder: package for package, folder in package_dir.items()}
    found: set[str] = set()
    for source in sources(*ROOMS):
        inside, room = source.parent, None
        while (room := by_folder.get(name_of(inside))) is None:
            inside = inside.parent
        found.add(".".join([room, *source.parent.relative_to(inside).parts]))
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)
    for source in sources(*ROOMS):
        assert (source.parent / "__init__.py").exists(), f"{name_of(source.parent)} has no __init__.py"


def test_the_type_checker_sees_the_installed_layout(tmp_path: Path) -> None:
    from link_farm import link

    link(ROOT, tmp_path)
    # Path.rglob follows no link, and neither does the checker: every file must be there behind real folders.
    farm = [each for each in tmp_path.rglob("*.py") if each.is_symlink()]
    assert {each.resolve() for each in farm} == set(sources(*ROOMS))
    assert {".".join(each.parent.relative_to(tmp_path).parts) for each in farm} == set(SETUPTOOLS["packages"])
