"""The step that registers a variant in MLflow."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.registry.tracking import artifact_root
from pipeline.steps.scores import EvaluateStep
from pipeline.steps.step import FileStep, Input, Need, Place, Recipe
from pipeline.steps.texts import WindowsStep
from pipeline.steps.variants import VariantStep
from pipeline.storage.store import Store


@dataclass(frozen=True, kw_only=True)
class RegisterStep(FileStep):
    """Log and register a variant in MLflow. Runs in the driver, the only process that writes to the store."""

    name = "register"
    revision = 1

    need: Need | None = None
    tracking_uri: Recipe[str]
    experiment: Recipe[str]
    model_name: Recipe[str]
    label: Recipe[str]
    gates: Recipe[dict[str, Any] | None]
    settings: Recipe[dict[str, Any]]
    text_names: Recipe[tuple[str, ...]]
    trust_remote_code: Place[bool]
    resources: Place[dict[str, Any]]
    variant: Input[VariantStep]
    baseline: Input[EvaluateStep]
    evaluation: Input[EvaluateStep]
    windows: Input[tuple[WindowsStep, ...]]

    def run(self, output: Path, store: Store) -> None:
        from pipeline.registry.registration import register_variant

        version = register_variant(
            tracking_uri=self.tracking_uri,
            artifact_root=artifact_root(self.tracking_uri, store),
            experiment=self.experiment,
            model_name=self.model_name,
            label=self.label,
            gates=self.gates,
            settings=self.settings,
            text_names=self.text_names,
            trust_remote_code=self.trust_remote_code,
            resources=self.resources,
            variant=store.path(self.variant),
            baseline=store.path(self.baseline),
            evaluation=store.path(self.evaluation),
            windows=store.paths(self.windows),
        )
        (output / "registration.json").write_text(json.dumps(version))
