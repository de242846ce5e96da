"""What export.py copies beside the weights: a configuration and a model in plain torch and transformers.

Nothing else in the project imports these two files, and they import nothing of the project.
"""
