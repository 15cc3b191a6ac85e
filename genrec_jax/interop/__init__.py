"""Parameters to and from the public PyTorch code (meta-recsys/generative-recommenders), by its own names."""

from genrec_jax.interop.files import read_tensors, write_tensors
from genrec_jax.interop.parameters import from_reference, load, save, to_reference

__all__ = ["from_reference", "load", "read_tensors", "save", "to_reference", "write_tensors"]
