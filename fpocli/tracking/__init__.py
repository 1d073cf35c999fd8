"""TensorBoard, W&B, MLflow and Trackio: what a run measures, sent there while it runs."""
