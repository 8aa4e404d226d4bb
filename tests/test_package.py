"""The installed package: the wheel holds every module, and each imports without the checkout."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_ALL = """
import importlib, pkgutil, sys
import fastcifar
assert "torch" not in sys.modules, "importing the package imports torch"
names = [module.name for module in pkgutil.walk_packages(fastcifar.__path__, "fastcifar.")]
for name in names:
    importlib.import_module(name)
print(*names, fastcifar.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("fastcifar", "kernels"):
        shutil.copytree(ROOT / part, folder / "source" / part)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, folder / "source")
    build = "-m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir".split()
    subprocess.run([sys.executable, *build, folder, folder / "source"], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True)
    return site


def test_every_module_is_in_the_wheel_and_imports(installed):
    code = f"import sys; sys.path.insert(0, {str(installed)!r})\n{IMPORT_ALL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=installed)
    assert done.returncode == 0, done.stderr
    *names, origin = done.stdout.split()
    assert Path(origin).is_relative_to(installed)
    files = [
        *ROOT.glob("fastcifar/**/*.py"),
        *(ROOT / "fastcifar" / file.relative_to(ROOT) for file in ROOT.glob("kernels/**/*.py")),
    ]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}
    assert modules - {"fastcifar"} == set(names)


def test_commands_run_from_the_root_of_the_checkout():
    kernels = "import importlib.util; assert importlib.util.find_spec('fastcifar.kernels')"
    for arguments in (["-m", "fastcifar.cli", "--help"], ["-c", kernels]):
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
