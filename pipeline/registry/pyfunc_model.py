"""A registered variant as MLflow serves it: text in, text out. Logged as code, so nothing is pickled."""

from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext


class CompressedModel(PythonModel):
    """Loads the base model where the variant says it is, attaches the variant, generates."""

    def load_context(self, context: PythonModelContext) -> None:
        from transformers import AutoTokenizer

        import lorc_core
        from lorc_core.loading import variant_and_base

        directory = context.artifacts["variant"]
        trusted = context.model_config["trust_remote_code"]
        _, location = variant_and_base(directory)
        base_dir = location.directory(weights=True)  # of a hub model the revision that was compressed
        self.model: Any = lorc_core.load(directory, base=base_dir, dtype="auto", trust_remote_code=trusted)
        self.tokenizer = AutoTokenizer.from_pretrained(base_dir, trust_remote_code=trusted)

    def predict(self, context: PythonModelContext, model_input: list[str], params: dict | None = None) -> list[str]:
        """One continuation per prompt; `params` go to `generate`."""
        texts = []
        for prompt in model_input:
            inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
            inputs.pop("token_type_ids", None)
            output = self.model.generate(**inputs, **(params or {"max_new_tokens": 64}))
            new_tokens = output[0, inputs["input_ids"].shape[1] :]
            texts.append(str(self.tokenizer.decode(new_tokens, skip_special_tokens=True)))
        return texts


mlflow.models.set_model(CompressedModel())
