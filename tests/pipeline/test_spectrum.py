"""At which share methods are compared: the first that a zoo names, else what its first budget in bytes came to."""

from lorc_core.methods import METHODS
from lorc_core.ranks.spectra import LayerRanks, RankSchedule
from pipeline.spectrum import compared_fraction
from pipeline.zoo.schema import Zoo

BUDGET = {"memory_gib": 1, "batch_size": 1, "context_tokens": 1}
RANKS = RankSchedule((LayerRanks((3,), (5,)),), kv_width=10)


def zoo(tmp_path, *variants):
    (tmp_path / "text.jsonl").write_text("{}")
    texts = [{"name": "text", "source": "text.jsonl"}]
    models = [{"name": "model", "source": "./model"}]
    content = {"name": "zoo", "models": models, "variants": list(variants), "evaluation": {"texts": texts}}
    return Zoo.model_validate(content, context={"folder": tmp_path})


def test_methods_are_compared_at_what_the_zoo_asks_for(tmp_path):
    shares = zoo(tmp_path, {"budget": BUDGET}, {"method": "lorc", "kept_fraction": [0.7, 0.5]})
    assert compared_fraction(shares, {"lorc_q-energy-1GiB": RANKS}) == 0.7
    bytes_alone = zoo(tmp_path, {"budget": BUDGET})
    assert bytes_alone.variants[0].method == METHODS["lorc_q"]
    assert compared_fraction(bytes_alone, {"lorc_q-energy-1GiB": RANKS}) == 0.4
    assert compared_fraction(bytes_alone, {}) is None
