"""Imported once, by the process that every worker is forked from, so that no worker imports the architectures again.

By no other process: it would be deaf to SIGTERM.
"""

import signal

from genrec_jax.models import registry

registry.names()
# Who ends a job sends SIGTERM to all its processes at once. This one must stay to tell how the workers end; each of
# them takes the signal when it is ready for it, were it sent before.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
# SLURM's warning to all processes of a job: submitit's own answers it, and sends the workers SIGTERM.
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
