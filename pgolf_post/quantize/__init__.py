"""Quantization: real weights → symbols and scales, a method a file; called, it is `model.quantize_view`."""

from pgolf_post.base.callable_package import make_callable

make_callable(__name__, "model:quantize_view")
