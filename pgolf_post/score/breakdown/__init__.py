"""Sums of a score by bin: by position, token, document and prediction, kept beside the score."""

KIND_NAMES = ("position", "token-class", "sentence", "repeat", "document", "frequency", "calibration", "confusions")
