"""What vLLM calls in each of its processes when it starts: the entry point `vllm.general_plugins`.

Nothing of vLLM, torch or this package's other rooms is imported before the call.
"""

from __future__ import annotations


def register() -> None:
    """Have vLLM know the quantisation method `eora`. May be called several times in a process.

    A vLLM that cannot be served is told in the log. It then goes on without the plugin, and refuses 2 and 3 bits by
    itself.
    """
    from .seams import install_or_log

    install_or_log()
