"""Scoring with M-FALCON: a history is encoded once, its keys and values are kept, candidates come in microbatches."""

from genrec_jax.serve.cache import UserCache
from genrec_jax.serve.events import Events, Request
from genrec_jax.serve.scorer import Scorer

__all__ = ["Events", "Request", "Scorer", "UserCache"]
