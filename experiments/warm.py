"""Imported once, by the process that every worker is forked from, so that no worker imports the architectures again."""

from genrec_jax.models import registry

registry.names()
