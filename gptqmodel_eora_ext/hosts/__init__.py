"""The only modules that import a host library. Each host's folder or file lists the seams it uses."""


class SeamError(RuntimeError):
    """A host that the plugin cannot serve."""
