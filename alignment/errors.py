"""Errors that are the user's to mend: one line that names the file, the key and the fix; never a traceback."""


class UserError(Exception):
    """Bad input, found before expensive work. The command prints it and exits with code 2."""


class TrainingStopped(Exception):
    """A run that cannot go on. Its state is saved; the command prints the reason and exits with code 1."""
