"""Packing: symbols → the smallest bytes, counted honestly, decoded by the decoder that ships."""
