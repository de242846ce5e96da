"""Experiments: schema, planning, the Ray DAG, the stage store, MLflow tracking, the command line. Only here: ray, mlflow."""
