"""Fast weight memories in JAX: linear Transformers as fast weight programmers."""
