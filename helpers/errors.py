"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something that a user can cause and can mend.

    The message is one sentence or two: what was found, what was needed, what to do next.
    The command line prints it without a traceback and exits with 2.
    """
