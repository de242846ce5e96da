"""What the figures of several stages have in common: style.py, a file per topic, and the list of all in listed.py."""
