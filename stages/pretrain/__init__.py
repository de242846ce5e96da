"""Pretraining: `stage.run`, and `python -m lazypipe.stages.pretrain` without Ray and MLflow."""
