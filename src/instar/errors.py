"""The two ways in which Instar refuses to go on, told apart so that the caller can react."""


class UserError(Exception):
    """What was asked for cannot be done; one sentence names the field or file and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """A run that was under way cannot continue (a non-finite loss, a full disk).

    The command line prints it without a traceback and exits with code 1.
    """
