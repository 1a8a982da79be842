"""vLLM in the environment that `make vllm` has made, for benchmarks and tests: servers to be asked one by one."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gptqmodel_eora_ext.system.files import cache_folder

HOME = Path(os.environ.get("EORA_VLLM", cache_folder() / "vllm"))
PYTHON = HOME / "bin" / "python"
MISSING = f"vLLM is not installed in {HOME}: run `make vllm`"
WORKER = Path(__file__).with_name("vllm_worker.py")


def is_installed() -> bool:
    """Whether the environment is there."""
    return (HOME / ".installed").is_file()


def vllm_version() -> str:
    """Of the vLLM in the environment."""
    listed = next(HOME.glob("lib/python*/site-packages/vllm*.dist-info"))
    return listed.name.removesuffix(".dist-info")


class Server:
    """A process that serves checkpoints by vLLM, one at a time.

    Args:
        stock: whether to leave the plugin out, as vLLM is without it.
        environment: more variables for the process.
    """

    def __init__(self, *, stock: bool = False, environment: Mapping[str, str] | None = None) -> None:
        own = {**os.environ, **({"VLLM_PLUGINS": ""} if stock else {}), **(environment or {})}
        # This tree's package; that path may name other packages for this process, which are not vLLM's.
        own["PYTHONPATH"] = str(WORKER.parents[1])
        # Closed with the process.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(PYTHON), str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=own,
        )  # fmt: skip

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def ask(self, model: Path | str, prompts: Sequence[Sequence[int]], **more: Any) -> dict[str, Any]:
        """What a checkpoint gives for prompts; `vllm_worker` tells the fields of question and answer.

        Raises:
            RuntimeError: when the process has ended, with the end of what it printed.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        question = {"model": str(model), "prompts": [list(ids) for ids in prompts], **more}
        print(json.dumps(question), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM's process has ended:\n{self.log()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def log(self) -> str:
        """What the process has printed so far."""
        self._log.seek(0)
        return self._log.read()
