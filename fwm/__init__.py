"""Fast weight memories in JAX: linear Transformers as fast weight programmers."""

from fwm.version import __version__ as __version__
