"""Where a score's nats lie: sums by bin of position, token, document and prediction, kept beside the score."""

KIND_NAMES = ("position", "token-class", "sentence", "repeat", "document", "frequency", "calibration", "confusions")
