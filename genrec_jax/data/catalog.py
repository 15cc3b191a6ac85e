"""From whatever ``--data`` names to a dataset folder: known raw folders are imported once, into a cache."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

from genrec_jax.data import amazon, globo, movielens
from genrec_jax.data.importer import import_log
from genrec_jax.data.raw import RawDataset
from genrec_jax.data.sequences import FORMAT
from genrec_jax.errors import UserError
from genrec_jax.paths import cache_root

_ADAPTERS = (
    movielens.ml_1m,
    movielens.ml_100k,
    movielens.ml_20m,
    amazon.beauty,
    amazon.books,
    globo.clicks,
)


def recognise(folder: str | Path) -> RawDataset | None:
    """The raw dataset that ``folder`` holds, told by its file names, or None."""
    return next((raw for adapter in _ADAPTERS if (raw := adapter(Path(folder))) is not None), None)


def load_any(path: str | Path, cache_dir: str | Path | None = None, *, quiet: bool = False) -> Path:
    """The dataset folder for ``path``: itself, or the cached import of the raw dataset it holds.

    The cache is ``cache_dir``, else ``$GENREC_CACHE/datasets``, else ``~/.cache/genrec/datasets``. Changed files are
    imported anew; of processes that ask at once, one imports and the others wait. Raises UserError if ``path`` is
    neither a dataset nor a known raw folder, or if its files are bad.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if (path / "dataset.json").is_file():
        return path
    raw = recognise(path)
    if raw is None:
        raise UserError(
            f"{path} is neither a dataset folder nor a raw dataset that is known here (ml-1m, ml-100k, ml-20m, "
            "amazon-beauty, amazon-books, globo): import your own log with `genrec data import`"
        )
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    target = cache / f"{raw.name}-{raw.fingerprint()}-v{FORMAT}"
    with _locked(target):
        if not (target / "dataset.json").is_file():
            import_log(raw.files, raw.mapping, target, name=raw.name, notes=raw.notes, quiet=quiet)
    return target


def default_cache() -> Path:
    """Where imported datasets are kept."""
    return cache_root() / "datasets"


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Holds the lock file beside ``target``; the system releases it if the process dies."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target.with_name(f"{target.name}.lock").open("w")
    except OSError as error:
        raise UserError(f"{target.parent} cannot hold imported datasets ({error.strerror}); set GENREC_CACHE") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
