"""Studies: one documented declaration per file, run by ``genrec sweep`` or ``python -m experiments.NAME``."""
