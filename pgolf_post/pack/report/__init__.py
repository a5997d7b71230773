"""Reports of an artifact's bytes: counted, predicted, by tensor, by codec, drawn."""
