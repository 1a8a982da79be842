"""Environments of all kinds: the plugin starts by itself where Python lets it, and `import torch` works in all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]
WITH_TORCH = Path(torch.__file__).parents[1]
ACTIVE = "import sys; print('active', '_HostFinder' in [getattr(one, '__name__', '') for one in sys.meta_path])"
TORCH = "import torch; print('torch', torch.__version__)"
FORMER_ENTRY = "[torch.backends]\ngptqmodel_eora_ext = gptqmodel_eora_ext.autoload:autoload\n"
SOURCES = ("gptqmodel_eora_ext", "pyproject.toml", "setup.cfg", "setup.py", "gptqmodel_eora_ext.pth", "README.md",
           "LICENSE", "MANIFEST.in")  # fmt: skip


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel, and that of an editable install, made by the real build backend."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source, place = REPOSITORY / name, folder / name
        if source.is_dir():
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, place)
    build = "from setuptools import build_meta as b; b.build_wheel('wheel'); b.build_editable('editable')"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {kind: next((folder / kind).glob("*.whl")) for kind in ("wheel", "editable")}


class Environment:
    """A virtual environment that sees torch, and the site packages that things are put into."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        self.site = next(folder.rglob("site-packages"))
        (self.site / "torch.pth").write_text(f"{WITH_TORCH}\n")

    def run(self, code: str, **variables: str) -> str:
        """What the code prints; nothing may be said beside it."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run([self.python, "-c", code], capture_output=True, text=True, cwd=self.site.parent,
                              env={**environment, **variables})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr == "", done.stderr[-3000:]
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "venv")


def unpack(wheel: Path, site: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_it_starts_by_itself_and_goes_with_its_record(
    wheels: dict[str, Path], environment: Environment, kind: str
) -> None:
    unpack(wheels[kind], environment.site)
    assert environment.run(ACTIVE) == "active True\n"
    assert environment.run(ACTIVE, GPTQMODEL_EORA_EXT_DISABLE="1") == "active False\n"
    (record,) = environment.site.glob("gptqmodel_eora_ext-*.dist-info/RECORD")
    # What an uninstall removes.
    assert any(line.startswith("gptqmodel_eora_ext.pth,") for line in record.read_text().splitlines())


def test_read_only_site_packages(wheels: dict[str, Path], environment: Environment) -> None:
    unpack(wheels["wheel"], environment.site)
    folders = [environment.site, *(path for path in environment.site.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert environment.run(ACTIVE) == "active True\n"
    finally:
        for folder in folders:
            folder.chmod(0o755)


def damage(environment: Environment, wheels: dict[str, Path], kind: str, elsewhere: Path) -> dict[str, str]:
    """An environment that sees our metadata and cannot import our module; the variables that it runs with."""
    if kind == "metadata alone":
        unpack(wheels["wheel"], environment.site)
        shutil.rmtree(environment.site / "gptqmodel_eora_ext")
    elif kind == "no autoload module":
        unpack(wheels["wheel"], environment.site)
        (environment.site / "gptqmodel_eora_ext" / "autoload.py").unlink()
    elif kind == "broken package":
        unpack(wheels["wheel"], environment.site)
        (environment.site / "gptqmodel_eora_ext" / "__init__.py").write_text("def broken(:\n")
    elif kind == "editable whose sources are gone":
        unpack(wheels["editable"], environment.site)
        (finder,) = environment.site.glob("__editable__*_finder.py")
        lines = [line for line in finder.read_text().splitlines() if not line.startswith("MAPPING:")]
        gone = f"MAPPING = {{'gptqmodel_eora_ext': {str(elsewhere / 'gone')!r}}}"
        finder.write_text("\n".join([lines[0], gone, *lines[1:]]))
    else:
        unpack(wheels["editable"], elsewhere)
        return {"PYTHONPATH": str(elsewhere)}
    return {}


@pytest.mark.parametrize(
    "kind",
    ["metadata alone", "no autoload module", "broken package", "editable whose sources are gone",
     "editable through PYTHONPATH"],
)  # fmt: skip
def test_import_torch_works_where_the_module_cannot_be_imported(
    wheels: dict[str, Path], environment: Environment, tmp_path: Path, kind: str
) -> None:
    variables = damage(environment, wheels, kind, tmp_path / "elsewhere")
    seen = "from importlib.metadata import distribution as d; print(d('gptqmodel-eora-ext').version)"
    assert environment.run(seen, **variables).strip()
    assert environment.run(f"{ACTIVE}; {TORCH}", **variables).startswith("active False\ntorch ")


def test_an_entry_point_would_break_it(wheels: dict[str, Path], environment: Environment) -> None:
    """Why it is none: torch passes on what an entry point raises."""
    unpack(wheels["wheel"], environment.site)
    shutil.rmtree(environment.site / "gptqmodel_eora_ext")
    (information,) = environment.site.glob("*.dist-info")
    (information / "entry_points.txt").write_text(FORMER_ENTRY)
    done = subprocess.run([environment.python, "-c", TORCH], capture_output=True, text=True,
                          cwd=environment.site.parent, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
    assert done.returncode != 0 and "Failed to load the backend extension" in done.stderr


def test_a_zip_file_can_be_imported_from(wheels: dict[str, Path], environment: Environment) -> None:
    load = "from gptqmodel_eora_ext.autoload import autoload; autoload()"
    found = environment.run(f"{ACTIVE}; {load}; {ACTIVE}", PYTHONPATH=str(wheels["wheel"]))
    assert found.splitlines()[0] == "active False" and found.splitlines()[-1] == "active True"
