"""The wheel holds every file of the packages and nothing else, and works where nothing else of the repository is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

PACKAGES = ("jobs", "lorc_core", "pipeline")
NEEDED_TO_BUILD = ("pyproject.toml", "README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__")
# Finding a module imports the rooms that it is in; importing all of them took 11 s of CPU time.
FIND_ALL = """
import importlib.util, pathlib, sys
site, *names = sys.argv[1:]
for name in names:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is absent"
    assert pathlib.Path(spec.origin).is_relative_to(site), f"{name} is {spec.origin}, not of the wheel"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the packages: in the repository an old `build` would lend its files to the wheel."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, source / package, ignore=LEFT_OUT)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()  # must stay outside
    for name in NEEDED_TO_BUILD:
        shutil.copy(REPOSITORY / name, source)
    # Not isolated, which would fetch setuptools from the network.
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A fresh virtual environment's packages: the wheel, and by a .pth line those that it needs.

    Python reads no .pth file of a directory that a .pth file names, so an editable installation of this repository
    in the other environment does not count.
    """
    environment = tmp_path_factory.mktemp("environment")
    run("-m", "venv", "--without-pip", environment)
    run("-m", "pip", "--quiet", "--python", environment, "install", "--no-deps", "--no-index", wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return site


def run(*arguments, python=sys.executable, cwd=None):
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_of(site):
    return site.parents[2] / "bin" / "python"


def clean():
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def package_files(root):
    """Contents by path."""
    paths = [path for package in PACKAGES for path in (root / package).rglob("*")]
    return {
        str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file() and path.suffix != ".pyc"
    }


def test_wheel_files_are_those_of_the_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    metadata = {name for name in contents if ".dist-info/" in name}
    tree = package_files(REPOSITORY)
    assert contents.keys() - metadata == tree.keys()
    assert all(contents[name] == content for name, content in tree.items())
    assert {"lorc_core/py.typed", "lorc_core/standalone/plain_model.py"} <= contents.keys()
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_wheel_modules_are_found_in_it_alone(site, tmp_path):
    modules = [Path(file).with_suffix("") for file in sorted(package_files(REPOSITORY)) if file.endswith(".py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in modules]
    run("-c", FIND_ALL, site, *names, python=python_of(site), cwd=tmp_path)


def test_wheel_command_starts(site, tmp_path):
    out = run(python_of(site).with_name("lorc"), "--help", python=python_of(site), cwd=tmp_path)
    assert "promote" in out
