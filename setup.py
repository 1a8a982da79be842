"""What pyproject.toml cannot say: `gptqmodel_eora_ext.pth` goes beside the package, in wheels and in editable installs.

Python's `site` runs that file at the start of each process; docs/how-it-works.md says why it is no entry point.
"""

from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

STARTUP = "gptqmodel_eora_ext.pth"


class BuildWithStartup(build_py):
    """Puts the file where wheels are made from."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            self.copy_file(STARTUP, str(Path(self.build_lib, STARTUP)))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        added = [] if self.editable_mode else [str(Path(self.build_lib, STARTUP))]
        return [*super().get_outputs(include_bytecode), *added]


class EditableWithStartup(editable_wheel):
    """Puts the file into the wheel of an editable install, which otherwise holds links to the sources alone."""

    def _run_build_commands(self, dist_name: str, unpacked_wheel: Any, *places: Any) -> Any:
        self.copy_file(STARTUP, str(Path(unpacked_wheel, STARTUP)))
        return super()._run_build_commands(dist_name, unpacked_wheel, *places)


setup(cmdclass={"build_py": BuildWithStartup, "editable_wheel": EditableWithStartup})
