"""The only modules that import a host library. Each host's folder or file lists the seams it uses."""

from .seam import SeamError

__all__ = ["SeamError"]
