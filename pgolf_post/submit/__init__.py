"""Handing in: a record folder whose train_gpt.py is made of our own modules and runs without them."""
