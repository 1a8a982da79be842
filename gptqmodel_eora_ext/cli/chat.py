"""The command `eora chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .ensemble import load
from .options import TrustRemoteCode
from .printing import errors, fail, note, say


def chat(
    path: Annotated[Path, typer.Argument(help="A checkpoint with an ensemble, or an ensemble's folder.")],
    max_new_tokens: Annotated[int, typer.Option(help="Of an answer.", min=1)] = 200,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Add every prompt that is routed, with the turns before it, to this file of JSON lines; by "
                          "default no text is kept."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:0; by default the host's choice.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model with an ensemble; every answer shows the weights that were chosen. An empty line ends it."""
    if prompts is not None and (prompts.is_dir() or not prompts.parent.is_dir()):
        fail(f"there is no folder `{prompts.parent}` to write `{prompts.name}` into, or that is a folder itself.")
    loaded, tokenizer = load(path, device, trust_remote_code)

    from ..adapter.ensemble.watch import Watch
    from ..hosts.conversation import Conversation
    from ..hosts.ensemble import ensemble_of

    found = ensemble_of(loaded.model)
    if prompts is not None:
        found.observers.append(Watch(found.members, prompts=prompts, decode=tokenizer.decode))
    conversation = Conversation(loaded.model, tokenizer, found, max_new_tokens=max_new_tokens)
    while said := _read():
        with errors():
            turn = conversation.say(said)
        say(turn.text)
        told = f"weights: {_shown(turn.weights)}"
        if turn.rerouted:
            told += "; routed anew, earlier turns are computed again"
        elif turn.wanted != turn.weights:
            told += f"; the cache is kept with them, though the router would now choose {_shown(turn.wanted)}"
        note(told)


def _read() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _shown(weights: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items()) or "shared alone"
