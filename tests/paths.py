"""Where the repository's demo models and the sample models are."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
DEMO = REPOSITORY / "examples" / "demo"
SHARED = Path(os.environ.get("LORC_SHARED", REPOSITORY.parent / "shared"))
SAMPLES = ("stories260K", "babyllama-tok361", "TinyStories-656K-np", "stdlib-llama-d64")
