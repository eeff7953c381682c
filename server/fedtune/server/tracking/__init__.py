"""Experiment trackers: TensorBoard, MLflow and W&B follow a run's files, each in a process of its own."""
