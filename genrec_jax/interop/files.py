"""Named arrays in files: npz, safetensors, and PyTorch's .pt for reading."""

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from genrec_jax.errors import UserError
from genrec_jax.interop.torch_file import read_torch

READABLE = (".npz", ".safetensors", ".pt", ".pth")
WRITABLE = (".npz", ".safetensors")


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name. Raises UserError if it is of no known kind or cannot be read as what it is."""
    if path.suffix not in READABLE:
        raise UserError(f"{path} is of no kind that can be read; there is: {', '.join(READABLE)}")
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return read_torch(path)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as opened, np.load(opened) as data:
            return {name: data[name] for name in data.files}
    except (ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is not a readable npz file") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path.open("rb").close()  # an error of the file system names the file here, and there it does not
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a readable safetensors file") from error


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays whole or not at all, in the order of their names. Raises UserError for an unknown kind."""
    if path.suffix not in WRITABLE:
        raise UserError(f"{path} is of no kind that can be written; there is: {', '.join(WRITABLE)}")
    # safetensors reads the memory of an array as if it were contiguous.
    arrays = {name: np.ascontiguousarray(tensors[name]).reshape(tensors[name].shape) for name in sorted(tensors)}
    scratch = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix == ".npz":
            np.savez(scratch, **arrays)  # type: ignore[arg-type]
        else:
            from safetensors.numpy import save_file

            scratch.open("wb").close()  # as above
            save_file(arrays, scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
