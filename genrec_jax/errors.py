"""The one exception that means "the user can mend this": printed as one sentence, exit code 2."""


class UserError(Exception):
    """A mistake in a file, flag or configuration; the message names the file, row or key."""
