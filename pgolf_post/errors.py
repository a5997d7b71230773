"""Foreseen failures: one class for each kind, with its exit code.

Every error a user can cause names the tensor or file, the value, the limit, and (as `hint`) the next command.
The command line prints `error: message`, then `next: hint`, and exits with the class's `exit_code`; a traceback is
shown only for unforeseen failures. Library callers catch `PgolfError`.
"""

from __future__ import annotations


class PgolfError(Exception):
    """A foreseen failure. `exit_code` is the process's exit status, `hint` the next thing to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class SettingsError(PgolfError):
    """A recipe, flag or key that is unknown, mistyped or out of range."""

    exit_code = 2


class NotFoundError(PgolfError):
    """A checkpoint, data folder or file that is not there."""


class DamagedFileError(PgolfError):
    """A file that does not hold what was written: truncated, changed, incomplete, or of another format."""


class MismatchError(PgolfError):
    """Two things that do not belong together: tensors and config, tokens and vocabulary, statistics and weights."""


class NumericsError(PgolfError):
    """A value that no later stage can use: NaN, infinity, a Hessian not positive definite at any allowed damping."""


class OverBudgetError(PgolfError):
    """Counted code plus artifact exceed the byte budget."""

    exit_code = 3


class StoppedEarlyError(PgolfError):
    """A run that ended before its end because it was worse than the one its recipe compares it with."""

    exit_code = 5


class VerificationError(PgolfError):
    """A recorded number that recomputation does not reproduce."""

    exit_code = 4
