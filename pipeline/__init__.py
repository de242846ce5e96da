"""Experiments: schema, planning, the Ray DAG, the stage store, MLflow, the command line. Only here: ray, mlflow."""
