"""The ledger: every run, checkpoint, artifact, score and old experiment in one table that remembers what came of it."""

from pgolf_post.ledger.schema import KINDS, VERDICTS, Kind, Row, Verdict
from pgolf_post.ledger.store import LEDGER_FILE, Ledger

__all__ = ["KINDS", "LEDGER_FILE", "VERDICTS", "Kind", "Ledger", "Row", "Verdict"]
