"""Compiled kernels: built on first use, kept in the cache folder, loaded without torch's loader afterwards.

The sources need neither torch's headers nor Python's, so a build takes seconds and serves every version of both.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..system.files import cache_folder

log = logging.getLogger(__name__)


class BuildError(RuntimeError):
    """The kernels cannot be compiled here."""


def library_path(name: str, sources: Path, flags: Sequence[str]) -> Path:
    """Where the library of all files in ``sources`` is kept: another place for other content or flags."""
    content = hashlib.sha256(" ".join((*flags, platform.machine(), sys.platform)).encode())
    for source in sorted(sources.iterdir()):
        content.update(source.name.encode() + source.read_bytes())
    return cache_folder() / "kernels" / f"{name}_{content.hexdigest()[:16]}.so"


def build(
    path: Path, sources: Sequence[Path], flags: Sequence[str], linking: Sequence[str] = (), *, cuda: bool = False
) -> Path:
    """Compile ``sources`` by torch's loader, unless they are there, and return the library's path.

    Args:
        path: from `library_path`.
        sources: what the compiler is given.
        flags: for the compiler: C++'s, or with ``cuda`` NVIDIA's.
        linking: for the linker.
        cuda: whether NVIDIA's compiler takes the sources.

    Raises:
        BuildError: without a compiler or `ninja`, or when compiling fails; the message tells which.
    """
    if path.is_file():
        return path
    from torch.utils import cpp_extension

    log.info("EoRA: compiling the %s kernels, once; they are kept as `%s`.", "CUDA" if cuda else "CPU", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    search = os.environ.get("PATH", "")
    # `ninja` is installed beside Python, which need not be on the path.
    os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), search))
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            cpp_extension.load(
                path.stem,
                [str(source) for source in sources],
                extra_cflags=[] if cuda else list(flags),
                extra_cuda_cflags=list(flags) if cuda else [],
                extra_ldflags=list(linking),
                with_cuda=cuda,
                build_directory=scratch,
                is_python_module=False,
            )
            # In one step, so that two processes that build at once do not see each other's halves.
            shutil.move(Path(scratch, path.name), path)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise BuildError(_reason(error)) from error
    finally:
        os.environ["PATH"] = search
    return path


def _reason(error: Exception) -> str:
    """The line of a compiler's output that tells what is wrong, or the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = (line for line in lines if any(word in line for word in ("error:", "cannot find", "fatal")))
    return next(telling, lines[0] if lines else repr(error))
