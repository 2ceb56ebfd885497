"""Packaging: what the wheel and the source distribution hold, and that an installed wheel works without the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and source distribution, made from a copy of what the repository tracks."""
    folder = tmp_path_factory.mktemp("packaging")
    tree = folder / "tree"
    names = ["optimizer", "passes", "backends", "pyproject.toml", "README.md", "LICENSE"]
    for name in names:
        here = ROOT / name
        if here.is_dir():
            shutil.copytree(here, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            tree.mkdir(exist_ok=True)
            shutil.copy(here, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def test_the_list_of_packages_is_the_tree() -> None:
    found = {
        ".".join(("planish", *path.parent.relative_to(ROOT).parts))
        for folder in ("optimizer", "passes", "backends")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == found


def test_package_data_are_files_that_exist() -> None:
    for package, patterns in SETTINGS["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        for pattern in patterns:
            assert [path for path in folder.glob(pattern) if path.is_file()], f"{package}: {pattern}"


def test_the_type_checkers_see_the_same_tree() -> None:
    for name in ("optimizer", "passes", "backends"):
        assert (ROOT / ".typing" / "planish" / name).resolve() == ROOT / name


@pytest.mark.slow
def test_the_wheel_holds_planish_alone(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"planish"}
    assert "planish/__init__.py" not in names
    files = {name for name in names if name.startswith("planish/")}
    expected = {
        f"planish/{path.relative_to(ROOT).as_posix()}"
        for folder in ("optimizer", "passes", "backends")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == expected


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path / "d"), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    (again,), (first,) = (tmp_path / "d").glob("*.whl"), built.glob("*.whl")
    one, other = zipfile.ZipFile(first), zipfile.ZipFile(again)
    assert {n: one.read(n) for n in one.namelist()} == {n: other.read(n) for n in other.namelist()}


@pytest.mark.slow
def test_an_installed_wheel_works_without_the_tree(built: Path, tmp_path: Path) -> None:
    """Not even where files of the commonest names lie in the working folder."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for name in ("optimizer", "passes", "backends"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('shadowed')\n")
    script = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); "
        "import planish.optimizer, planish.passes.fusion.fuse_gelu, planish.backends.onnxruntime.target as found; "
        "from planish.optimizer.output.report import write_report; print(found.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "site"))


def test_the_editable_install_reads_this_tree() -> None:
    import planish.optimizer

    assert Path(planish.optimizer.__file__ or "").parent == ROOT / "optimizer"


def test_what_is_declared_is_what_is_registered() -> None:
    points = metadata.entry_points(module="planish.optimizer.cli")
    assert [point.name for point in points] == ["planish"]
    for kind in ("passes", "backends"):
        assert "planish" in {point.name for point in metadata.entry_points(group=f"planish.{kind}")}


def test_the_tested_set_fulfils_what_is_declared() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and line[0] != "#"]
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    extras = SETTINGS["project"]["optional-dependencies"]
    for text in [*SETTINGS["project"]["dependencies"], *extras["cpu"], *extras["dev"]]:
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text
