"""Each model's candidate: chosen after a run among the variants that its zoo file asks for, and noted in the store."""

import json
from collections.abc import Sequence
from typing import Any

from lorc_core.manifest import checked_file
from pipeline.registry.tracking import default_tracking_uri
from pipeline.steps.failures import model_failure
from pipeline.steps.graph import ModelSteps
from pipeline.steps.outcome import Listener, Outcome
from pipeline.steps.step import Step
from pipeline.storage.store import Store
from pipeline.zoo.schema import Zoo


def choose_candidates(zoo: Zoo, store: Store, models: Sequence[ModelSteps], listener: Listener) -> list[Outcome]:
    """Move each model's alias `candidate` to the best variant that passes the gates, or remove it.

    What was chosen, and from what, is noted, so that a run that changes nothing need not ask MLflow.

    Returns:
        The failures.
    """
    choices = {
        model.model.entry.name: [
            registration(store, variant.register)["version"]
            for variant in model.variants
            if store.is_done(variant.register)
        ]
        for model in models
    }
    tracking_uri = default_tracking_uri(zoo, store.name)
    gates = zoo.gates.model_dump(mode="json") if zoo.gates else None
    recipe = {"choices": choices, "gates": gates, "tracking_uri": tracking_uri}
    if read_note(zoo, store).get("recipe") == recipe:
        return []
    listener.phase("choosing candidates")
    from pipeline.registry.promotion import choose_candidate

    before = candidates(zoo, store)
    chosen: dict[str, str | None] = {}
    failed = []
    for name, versions in choices.items():
        try:
            if versions:
                chosen[name] = choose_candidate(tracking_uri, name, versions, zoo.gates)
        except Exception as error:  # noqa: BLE001  MLflow may be away; the tables are still written
            failed.append(model_failure("candidate", name, error, store))
            if name in before:  # whose alias still stands
                chosen[name] = before[name]
    note = store.place(*note_parts(zoo))
    note.write_text(json.dumps({"recipe": None if failed else recipe, "chosen": chosen}))
    store.publish(note)
    return failed


def candidates(zoo: Zoo, store: Store) -> dict[str, str | None]:
    """The version that was made each model's candidate when its last run ended, None where no version was.

    Models that this zoo registered nothing of are absent.
    """
    return read_note(zoo, store).get("chosen", {})


def registration(store: Store, step: Step) -> dict[str, str]:
    """Name, version and run id that a finished register step wrote."""
    return json.loads(checked_file(store.path(step) / "registration.json").read_text())


def read_note(zoo: Zoo, store: Store) -> dict[str, Any]:
    """What was noted last; empty before the first choice."""
    try:
        note = json.loads(store.known(*note_parts(zoo)).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def note_parts(zoo: Zoo) -> tuple[str, str]:
    """Where the note is in the store."""
    return "candidates", f"{zoo.name}.json"
