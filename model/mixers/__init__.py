"""The token mixers, one file each; registry.py is the table of them, and loads no torch."""
