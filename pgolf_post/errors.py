"""What can go wrong, said in one place.

Every error a user can cause names the tensor or file, the value, the limit, and (as `hint`) the next command.
The command line prints `error: message`, then `next: hint`, and exits with the class's `exit_code`; a traceback is
shown only for what we did not foresee. Library callers catch `PgolfError`.
"""

from __future__ import annotations


class PgolfError(Exception):
    """A foreseen failure. `exit_code` is the process's exit status, `hint` the next thing to do."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class SettingsError(PgolfError):
    """A recipe, flag or key that cannot be used: unknown, mistyped or out of range."""

    exit_code = 2


class NotFoundError(PgolfError):
    """A checkpoint, data folder or file that is not there."""


class DamagedFileError(PgolfError):
    """A file whose bytes are not what was written: truncated, flipped, incomplete, or of another format."""


class MismatchError(PgolfError):
    """Two things that must belong together and do not: tensors and config, tokens and vocabulary, stats and weights."""


class NumericsError(PgolfError):
    """A value no later stage can use: NaN, infinity, a Hessian that no allowed damping makes positive definite."""


class OverBudgetError(PgolfError):
    """Counted code plus artifact exceed the byte budget."""

    exit_code = 3


class VerificationError(PgolfError):
    """A recorded number that was recomputed and did not come out the same."""

    exit_code = 4
