"""The challenge's rules as executable tests: of how a protocol behaves, and of the text it scores."""
