"""A report as one HTML file: the template with its style and script, and the server that keeps it fresh."""
