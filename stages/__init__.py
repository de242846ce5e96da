"""What each stage does, as plain functions `run(config, inputs, context) -> Outputs`. Knows neither Ray nor MLflow."""
