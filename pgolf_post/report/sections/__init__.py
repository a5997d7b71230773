"""The sections of a report, one file each; `page/render.py` puts them together."""
