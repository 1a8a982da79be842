"""Commands that `torchrun` starts several times at once, to work on one run together."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from ..system.distributed import joined, launched
from ..system.peers import LOST_STATUS, PeerLost
from .printing import WRONG_REQUEST, err, out, tell_plainly

# The others run in one process.
SHARED_COMMANDS = ("quantize", "generate", "plan", "refine")


@contextlib.contextmanager
def several() -> Iterator[None]:
    """Within the block this process works together with those that it was started among; rank 0 alone prints."""
    if launched() == 1:
        yield
        return
    try:
        with joined() as group:
            assert group is not None
            out.quiet = err.quiet = not group.is_first
            group.at(f"eora {' '.join(sys.argv[1:2])}")
            _check_command(group.is_first)
            yield
    except PeerLost as error:
        tell_plainly(f"error: {error}")
        sys.exit(LOST_STATUS)
    except ValueError as error:
        tell_plainly(f"error: {error}")
        sys.exit(WRONG_REQUEST)


def _check_command(first: bool) -> None:
    """Leave where the command is one that several processes cannot share; help is for everybody."""
    named = next((one for one in sys.argv[1:] if not one.startswith("-")), None)
    if named is not None and named not in SHARED_COMMANDS and "--help" not in sys.argv:
        if first:
            tell_plainly(
                f"error: `eora {named}` runs in one process, and {launched()} were started. Start it without torchrun; "
                f"{', '.join(SHARED_COMMANDS)} can be shared."
            )
        sys.exit(WRONG_REQUEST)
