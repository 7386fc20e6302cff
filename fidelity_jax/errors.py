"""What the command line turns into one clear line and an exit status."""


class UsageError(Exception):
  """The user asked for something impossible; `main` exits with status 2.

  The message is one line: what is wrong, where, and what to do about it.
  """


class RunError(Exception):
  """A well-formed request failed while it ran; `main` exits with status 1.

  The message is one line: what is wrong, where, and what to do about it.
  """
