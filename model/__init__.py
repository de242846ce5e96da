"""The language model: configuration, token mixers, transformer, checkpoints. Imports `kernels` and nothing else of ours."""
