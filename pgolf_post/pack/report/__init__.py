"""What an artifact's bytes are spent on: counted, predicted, by tensor, by codec, drawn."""
