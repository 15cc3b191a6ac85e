"""``genrec parity``: golden vectors recorded from a public implementation, held against what is built here.

A kind of file is a reader, which turns the file's arrays into a `case.Case`; to check another kind, write its reader
and list it in `command.KINDS`. The first word of a file's name says its kind (``attention_causal.npz``), else what it
holds does.
"""
