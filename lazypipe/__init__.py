"""lazypipe: attention experiments from one YAML file. Light: nothing heavy is imported here.

    from lazypipe.kernels import lazy_attention    the attention function, for a model of one's own
    from lazypipe.model.config import ModelConfig   what a model is
    from lazypipe.pipeline.experiment.schema import load_experiment

`lazypipe.kernels`, `.model`, `.stages` and `.pipeline` are links to the folders of the same name at the root of the
repository; a wheel holds them as ordinary folders.
"""
