"""Quantization: real weights → integer symbols and scales. One method is one file."""
