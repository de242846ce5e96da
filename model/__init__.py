"""The language model: configuration, token mixers, transformer, checkpoints. Imports only `kernels` of ours."""
