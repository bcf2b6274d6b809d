"""The model registry, all that knows MLflow: what is registered, which version is candidate and which champion.

What is measured before is in `steps`; how scores are compared in `gates`.
"""

import os

# Read by MLflow when it is imported, which the modules below do after this.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# Its own would be many minutes without a word; who waits, says so and knows for how long is `pipeline.waiting`.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
