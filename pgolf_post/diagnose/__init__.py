"""Diagnosis: numbers about a checkpoint's weights, activations and learned scalars, the suspicious ones marked."""
