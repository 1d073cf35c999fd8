"""MLflow, by its own client; its environment variables (MLFLOW_TRACKING_URI, ...) hold."""

import logging
import os
from pathlib import Path
from typing import Any

from fpocli.tracking.tracker import Rows, Tracker


class MLflow(Tracker):
    """A run of MLflow."""

    def __init__(self, folder: Path, settings: dict[str, Any], run: str | None) -> None:
        import mlflow

        # Not mlflow.start_run: it ends the run once more at exit, and prints.
        self._client = mlflow.MlflowClient()
        if run is None:
            experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
            if experiment is None:
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fpo")
                experiment = mlflow.set_experiment(name).experiment_id
            begun = self._client.create_run(experiment, run_name=folder.name)
            self.run = begun.info.run_id
            mlflow.log_params(settings, run_id=self.run)
        else:
            self.run = run
            self._client.update_run(run, status="RUNNING")
        self.where = f"run {self.run} at {mlflow.get_tracking_uri()}"

    @staticmethod
    def check() -> None:
        """Nothing: a server is asked when the run begins."""
        # Its seven take four minutes, in which training would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        import mlflow  # noqa: F401

        # It tells of every experiment that it makes.
        logging.getLogger("mlflow").setLevel(logging.WARNING)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the metrics of a step."""
        import mlflow

        mlflow.log_metrics(numbers, step=step, run_id=self.run)

    def results(
        self, numbers: dict[str, float], images: dict[str, Path], tables: dict[str, Rows], step: int
    ) -> None:
        """Images and tables become artifacts."""
        import mlflow

        self.log(numbers, step)
        for name, file in images.items():
            mlflow.log_artifact(str(file), str(Path(name).parent), run_id=self.run)
        for name, rows in tables.items():
            columns = {column: [row[column] for row in rows] for column in (rows or [{}])[0]}
            mlflow.log_table(columns, f"{name}.json", run_id=self.run)

    def close(self, *, complete: bool) -> None:
        """Say how the command ended."""
        self._client.set_terminated(self.run, "FINISHED" if complete else "KILLED")
