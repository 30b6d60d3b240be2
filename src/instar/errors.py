"""The three ways in which Instar refuses to go on, told apart so that the caller can react.

Each has the exit code with which the command line ends.
"""


class UserError(Exception):
    """What was asked for cannot be done; one sentence names the field or file and the remedy.

    The command line prints it without a traceback and exits with code 2.
    """

    code = 2


class RunError(Exception):
    """A run that was under way cannot continue (a non-finite loss, a full disk).

    The command line prints it without a traceback and exits with code 1.
    """

    code = 1


class RestartError(Exception):
    """Another process is missing, gone or hangs: nothing is wrong that a new start does not mend.

    The command line prints it without a traceback and exits with code 75 (EX_TEMPFAIL of
    sysexits.h), by which a scheduler knows that it is to start the job again.
    """

    code = 75
