"""The processes of a run, as each of them sees the others: who is alive, what each is at, and who was lost.

Every process writes a beat into the store that it found the others by, a few times in ten seconds, from a thread of its
own, and reads the beats of the others. A beat tells host, process id, what the process is at (its phase), and
whether it waits for another one. So four things can be told apart and named:

- a process that failed says so in its last beat, with its error;
- one that was killed on this host is not in the system's table of processes any more;
- one that was killed or stopped elsewhere, or whose host is gone, is silent: its beat stays the same;
- one that hangs goes on beating, and does not wait, while all others do.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

log = logging.getLogger(__name__)

# Seconds between two beats. A beat takes two short messages to the store, whatever the number of processes.
BEAT_SECONDS = 2.0
# After so many seconds without a beat a process is lost. A beat is late where the processors are very busy.
SILENT_SECONDS = 60.0
# A process that has heard of a loss, and has not come to an end of itself by then, is ended.
GRACE_SECONDS = 10.0
# A process that ends waits so long for its last question to the store, whose host may be gone.
STOP_SECONDS = 5.0
# Rank 0 tells whom it waits for once it has waited so long, and again each time that this has passed.
TELL_SECONDS = 30.0
# Status of a process that ends because another one was lost: "temporary failure" in sysexits.h. What was asked is
# right, and the same command may be started again.
LOST_STATUS = 75

DONE, FAILED, LOST = "done", "failed", "lost"


class PeerLost(Exception):
    """Another process of the run failed, was killed, or does not answer. The message names it.

    No `OSError`, which libraries catch where they look for files.

    Attributes:
        lost: who was lost, and how that is known.
    """

    def __init__(self, lost: str) -> None:
        super().__init__(ended_by(lost))
        self.lost = lost


@dataclass(frozen=True)
class Beat:
    """What a process tells of itself.

    Attributes:
        count: of its beats.
        host: where it runs.
        pid: its process id there.
        phase: what it is at.
        waiting: whether it is in an exchange, where it waits for others.
        ended: "done", "failed" or "lost" once it has ended, else empty.
        why: its error, or whom it has lost.
    """

    count: int
    host: str
    pid: int
    phase: str = "starting"
    waiting: bool = False
    ended: str = ""
    why: str = ""


class Peers:
    """Beats of this process and of the others. Safe to use from several threads.

    Args:
        store: to exchange beats by; a connection that nothing else uses.
        rank: of this process.
        size: number of processes.
        silent: seconds without a beat after which a process is lost.
    """

    def __init__(self, store: Store, rank: int, size: int, silent: float = SILENT_SECONDS) -> None:
        self._store = store
        self.rank = rank
        self.size = size
        self._silent = silent
        self._period = min(BEAT_SECONDS, silent / 5)
        self._mine = Beat(0, socket.gethostname(), os.getpid())
        self._beats: dict[int, Beat] = {}
        self._changed: dict[int, float] = {}
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = False
        self._lost: str | None = None
        self._noticed = 0.0
        self._since = self._told = 0.0
        self._thread = threading.Thread(target=self._run, name="eora-peers", daemon=True)

    def start(self) -> None:
        """Begin to beat, once every process has its first beat in the store."""
        self._write()
        self._store.wait([self._key(rank) for rank in range(self.size)])
        self._read()
        self._thread.start()

    def end(self, how: str, why: str = "") -> None:
        """Tell the others how this process ends, as far as the store still answers, and stop beating."""
        with self._lock:
            if self._mine.ended:
                return
            self._mine = replace(self._mine, ended=how, why=why)
        self._stop = True
        self._wake.set()
        # Where whoever held the store is gone, the others notice that as well.
        with suppress(RuntimeError, OSError):
            self._write()
        # Python ends a thread that comes back from the store after the interpreter's end by an exception that C++ does
        # not let through: the process would be aborted, whatever status it ends with.
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(STOP_SECONDS)

    def at(self, phase: str) -> None:
        """Tell what this process is at now."""
        with self._lock:
            self._mine = replace(self._mine, phase=phase)
        self._wake.set()

    def waits(self, waiting: bool) -> None:
        """Tell that this process waits for others from now on, or no longer."""
        with self._lock:
            self._mine = replace(self._mine, waiting=waiting)
            self._since = self._told = time.monotonic()

    @property
    def phase(self) -> str:
        """What this process is at."""
        return self._mine.phase

    def lost(self) -> str | None:
        """Who was lost, for a message; None while nobody is."""
        return self._lost

    def busy(self) -> list[int]:
        """Ranks that do not wait for another process: the ones that all others wait for."""
        with self._lock:
            return [rank for rank, beat in self._beats.items() if not beat.waiting and not beat.ended]

    def named(self, rank: int) -> str:
        """A process for a message: rank, host, process id and last phase."""
        with self._lock:
            beat = self._mine if rank == self.rank else self._beats.get(rank)
        if beat is None:
            return f"rank {rank}"
        return f"rank {rank} ({beat.host}, process {beat.pid}; last at: {beat.phase})"

    def look(self, seconds: float) -> str | None:
        """Look for a lost process for up to some seconds; called after an exchange has failed, and before it ends."""
        until = time.monotonic() + seconds
        while self._lost is None:
            try:
                self._read()
            except (RuntimeError, OSError) as error:
                self._lose(self._store_gone(error))
            self._judge()
            if time.monotonic() >= until:
                break
            time.sleep(0.1)
        return self._lost

    def leave(self, lost: str) -> None:
        """Say who was lost, tell the others, and end this process at once."""
        print(f"error: {ended_by(lost)}", file=sys.stderr, flush=True)
        self.end(LOST, lost)
        os._exit(LOST_STATUS)

    def _key(self, rank: int) -> str:
        return f"beat/{rank}"

    def _write(self) -> None:
        with self._lock:
            self._mine = replace(self._mine, count=self._mine.count + 1)
            mine = self._mine
        self._store.set(self._key(self.rank), json.dumps(asdict(mine)))

    def _read(self) -> None:
        others = [rank for rank in range(self.size) if rank != self.rank]
        found = self._store.multi_get([self._key(rank) for rank in others])
        now = time.monotonic()
        with self._lock:
            for rank, raw in zip(others, found, strict=True):
                beat = Beat(**json.loads(raw))
                if rank not in self._beats or beat.count != self._beats[rank].count:
                    self._changed[rank] = now
                self._beats[rank] = beat

    def _judge(self) -> None:
        """Notice who was lost. What a process says itself comes first, then what this host knows, then silence."""
        now = time.monotonic()
        with self._lock:
            beats, changed = dict(self._beats), dict(self._changed)
        for rank, beat in beats.items():
            if beat.ended == FAILED:
                self._lose(f"{self.named(rank)} failed: {beat.why}")
        for rank, beat in beats.items():
            if not beat.ended and beat.host == self._mine.host and _is_gone(beat.pid):
                self._lose(f"{self.named(rank)} was killed or has crashed")
        for beat in beats.values():
            if beat.ended == LOST:
                self._lose(beat.why)
        for rank, beat in beats.items():
            if not beat.ended and now - changed[rank] > self._silent:
                self._lose(f"{self.named(rank)} has not been heard of for {self._silent:.0f} s: it was killed or "
                           f"stopped, or its host cannot be reached")  # fmt: skip

    def _lose(self, who: str) -> None:
        if self._lost is None:
            self._noticed = time.monotonic()
            self._lost = who

    def _store_gone(self, error: Exception) -> str:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"the store by which the processes find one another does not answer ({reason}): torchrun on the first "
            f"node, or rank 0, has ended"
        )

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop:
            self._wake.wait(self._period)
            self._wake.clear()
            now = time.monotonic()
            if now - before > 3 * self._period:
                # This process itself was held up, as by a debugger or a whole machine that slept. Nothing can be said
                # of the silence of others meanwhile.
                self._changed = dict.fromkeys(self._changed, now)
            before = now
            try:
                if not self._stop:
                    self._write()
                self._read()
            except (RuntimeError, OSError) as error:
                if not self._stop:
                    self._lose(self._store_gone(error))
            if self._stop:
                return
            self._judge()
            self._tell(time.monotonic())
            if self._lost is not None and time.monotonic() - self._noticed > GRACE_SECONDS:
                self.leave(self._lost)

    def _tell(self, now: float) -> None:
        """Say in the log of rank 0 whom it waits for, where it waits long."""
        if self.rank == 0 and self._mine.waiting and now - self._told > TELL_SECONDS:
            self._told = now
            named = " and ".join(self.named(rank) for rank in self.busy())
            log.warning("EoRA: rank 0 has waited %.0f s for %s.", now - self._since, named or "the exchange to end")


def ended_by(lost: str) -> str:
    """The message of a process that ends because another was lost."""
    return (
        f"EoRA: {lost}. The other processes have ended with it, and nothing half-written was left in place of a "
        f"finished file. Look at the output of that process, and start all of them again."
    )


def _is_gone(pid: int) -> bool:
    """Whether a process of this host has ended; one that its parent has not taken notice of yet has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    try:
        # The state stands after the program's name, which is in parentheses and may hold anything.
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("Z", "X")
