"""The zoo file: what is accepted, and that every error names the file, the field and what is allowed."""

import json
import subprocess
import sys

import pytest
import yaml

from lorc_core.errors import ConfigError
from lorc_core.methods import METHODS, Axes, method_from_dict
from lorc_core.ranks.progressive import Progressive
from lorc_core.ranks.schedules import Uniform
from pipeline.zoo.consistency import cautions
from pipeline.zoo.file import load_zoo
from pipeline.zoo.variants import variant_label
from tests.paths import REPOSITORY
from tests.zoos import ZOO


@pytest.fixture
def content(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "x"}')
    return yaml.safe_load(ZOO.format(kept="[0.9, 0.5]"))


@pytest.fixture
def load(tmp_path):
    def load(content):
        (tmp_path / "zoo.yaml").write_text(yaml.safe_dump(content))
        return load_zoo(tmp_path / "zoo.yaml")

    return load


def test_paths_are_resolved_beside_the_zoo_file(content, load, tmp_path):
    zoo = load(content)
    assert zoo.models[0].source == str(tmp_path / "small-llama")
    assert zoo.models[0].is_directory
    assert zoo.evaluation.texts[0].file == tmp_path / "text.jsonl"


def test_schedules_are_built_from_a_name_or_from_fields(content, load):
    content["variants"][0]["schedule"] = {"name": "progressive", "min_rank": 4, "skip_layers": [0, 1]}
    zoo = load(content)
    assert zoo.variants[0].schedule == Progressive(min_rank=4, skip_layers=(0, 1))
    assert zoo.variants[1].schedule == Progressive()
    content["variants"][0]["schedule"] = "uniform"
    assert load(content).variants[0].schedule == Uniform()


def test_one_kept_fraction_is_a_list_of_one(content, load):
    assert load(content).variants[1].kept_fraction == (0.75,)


def test_without_a_method_the_best_is_taken_that_there_is_text_for(content, load):
    content["variants"] = [{"kept_fraction": 0.5}]
    assert load(content).variants[0].method == METHODS["lorc_q"]
    content["evaluation"]["texts"][0]["part"] = [0.25, 1]
    content["calibration"] = {"texts": [{"name": "c", "source": "text.jsonl", "part": [0, 0.25]}]}
    (variant,) = load(content).variants
    assert variant.method == METHODS["kq_joint"]
    assert variant.schedule == variant.method.schedule


def test_a_method_is_written_from_a_preset_from_axes_or_layer_by_layer(content, load):
    content["variants"][0]["method"] = {
        "name": "mixed",
        "preset": "lorc",
        "keys": {"block": "head", "gqa": "sum"},
        "per_layer": {
            0: "lorc_q",
            "2-3": {
                "name": "own",
                "keys": {"statistics": "weights"},
                "values": {"statistics": "weights", "block": "group(2)"},
            },
        },
    }
    method = load(content).variants[0].method
    assert method.keys == Axes("weights", block="head", gqa="sum")
    assert method.values == Axes("weights")
    assert method.at(0) == METHODS["lorc_q"]
    assert [method.axes(layer, "values").block for layer in range(5)] == [
        "joint",
        "joint",
        "group(2)",
        "group(2)",
        "joint",
    ]
    assert variant_label(load(content).variants[0], 0.9) == "mixed-uniform-0.9"
    assert method_from_dict(json.loads(json.dumps(method.to_dict()))) == method


def test_rotated_keys_calibrated_on_too_few_positions_are_a_caution(content, load):
    content["evaluation"]["texts"][0]["part"] = [0.25, 1]
    content["calibration"] = {
        "texts": [{"name": "c", "source": "text.jsonl", "part": [0, 0.25]}],
        "window_tokens": 16,
        "num_windows": 20,
    }
    content["variants"] = [{"method": name, "kept_fraction": 0.5} for name in ("kq_joint", "kq_svd", "lorc")]
    content["variants"].append({"method": "phasor_freq", "kept_fraction": 0.5})  # the same at every position
    (caution,) = cautions(load(content).parts)
    assert caution.startswith("kq_svd: rotated keys are calibrated on positions below 16 and averaged over the 32 that")
    content["calibration"]["window_tokens"] = 32
    assert cautions(load(content).parts) == []


def set_at(content, path, value):
    for part in path[:-1]:
        content = content[part]
    content[path[-1]] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["modles"], [], r"modles: unknown field; did you mean models\? allowed here are name, models, variants, cal"),
        (["models", 0, "dtyp"], "float32", r"models\.0\.dtyp: unknown field; did you mean dtype\? allowed here are na"),
        (["models", 0, "xyz"], 1, r"models\.0\.xyz: unknown field; allowed here are name, source, revision"),
        (["models", 0, "dtype"], "float8", r"models\.0\.dtype: input should be 'float32', 'bfloat16' or 'float16'"),
        (["models", 0, "source"], "a/b/c", r"models\.0\.source: a directory starts with \./"),
        (["models", 1, "name"], "small-llama", "models: the name 'small-llama' is used twice"),
        (
            ["models", 0, "resources"],
            {"gpus": 1},
            r"models\.0\.resources\.gpus: unknown field; did you mean num_gpus",
        ),
        (["variants", 0, "method"], "lork", r"variants\.0\.method: method 'lork' is not known; known are eigen.*zack$"),
        (["variants", 0, "method"], {"preset": "lorc"}, "a method that is no preset needs a name of its own"),
        (
            ["variants", 0, "method"],
            {"name": "x", "keys": {"statistics": "weights"}},
            r"values\.statistics: Field required",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "blocks": "head"},
            "unknown field 'blocks'; a method, if not a name, allows preset, name, keys",
        ),
        (["variants", 0, "method"], ["lorc"], "a method, if not a name, is a mapping with preset, name, keys, values"),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "keys": {"blok": "head"}},
            "unknown field 'blok'; keys allows statistics, reader, block, space, gqa, mean",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "keys": {"block": "heads"}},
            r"block 'heads' is not known; known are joint, head, group\(HEADS\), frequency",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "values": {"reader": "all"}},
            r"values\.reader: Input should be 'none', 'stacked', 'interaction' or 'gradient'",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "values": {"space": "post_rope"}},
            "values are not rotated: their space is pre_rope",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "keys": {"block": "frequency"}},
            "block frequency needs space post_rope",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "phasor_freq", "training": {"num_steps": 3}},
            "trained projections need real blocks",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "per_layer": {"a": "lorc_q"}},
            "per_layer: 'a' is no layer",
        ),
        (["variants", 0, "method"], {"name": "x", "preset": ["lorc"]}, "preset is the name of a method; got"),
        (["variants", 0, "method"], {"name": "lorc", "preset": "lorc_q"}, "a method that is no preset needs a name"),
        (["variants", 0, "method"], {"name": "x", "preset": "lorc", "keys": "head"}, "keys is a mapping with"),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "keys": {"block": 3}},
            r"keys\.block: Input should be a valid string",
        ),
        (["variants", 0, "method"], {"name": "x", "preset": "lorc", "per_layer": ["lorc"]}, "per_layer is a mapping"),
        (["variants", 0, "method"], {"name": "x", "preset": "lorc", "per_layer": {"3-1": "lorc"}}, "'3-1' is no layer"),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "per_layer": {"0-1": "lorc", "1": "lorc_q"}},
            "a layer has one method",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "training": {"num_step": 3}},
            "unknown field 'num_step'; training allows num_steps",
        ),
        (
            ["variants", 0, "method"],
            {"name": "x", "preset": "lorc", "training": {"learning_rate": -1}},
            "learning_rate must be positive, got -1",
        ),
        (
            ["variants", 0],
            {
                "method": {"name": "x", "preset": "lorc", "training": {"lora_rank": 2}},
                "schedule": "fisher",
                "kept_fraction": 0.5,
            },
            "schedule fisher measures without the adapters of lora_rank",
        ),
        (["variants", 0, "method"], "kq_joint", "kq_joint measures on text, but there is no calibration"),
        (["variants", 0, "schedule"], "fisher", "schedule fisher measures on text, but there is no calibration"),
        (
            ["variants", 0, "budget"],
            {"memory_gib": 1, "batch_size": 1, "context_tokens": 1},
            r"variants\.0\.budget: give kept_fraction or budget, one of them",
        ),
        (
            ["calibration"],
            {"texts": [{"name": "c", "source": "text.jsonl"}]},
            "calibration.texts: c is also evaluated, as stdlib; give each its part",
        ),
        (
            ["calibration"],
            {"texts": [{"name": "c", "source": "text.jsonl", "part": [0.5, 0.5]}]},
            "part must go from a share of the text to a larger one",
        ),
        (
            ["calibration"],
            {"texts": [{"name": "c", "source": "text.jsonl"}], "num_windows": 2, "shards": 3},
            r"calibration\.shards: input should be at most num_windows, 2, got 3$",
        ),
        (
            ["variants", 0, "schedule"],
            "unifrom",
            r"schedule 'unifrom' is not known; known are energy, error_budget, fisher, progressive, sensitivity, uniform",
        ),
        (
            ["variants", 0, "schedule"],
            {"name": "uniform", "min_rank": 3},
            "unknown field 'min_rank'; uniform allows rank_",
        ),
        (
            ["variants", 0, "schedule"],
            {"name": "uniform", "rank_multiple": 0},
            "rank_multiple must be at least 1, got 0",
        ),
        (
            ["variants", 0, "schedule"],
            {"name": "uniform", "rank_multiple": "x"},
            "rank_multiple: Input should be a val",
        ),
        (["variants", 0, "schedule"], ["uniform"], "a schedule is a name, or a mapping with a name"),
        (["variants", 0, "kept_fraction"], 0, r"variants\.0\.kept_fraction\.0: input should be greater than 0, got 0"),
        (
            ["variants", 0, "kept_fraction"],
            [0.5, 1.2],
            r"kept_fraction\.1: input should be less than or equal to 1, go",
        ),
        (["variants", 0, "kept_fraction"], [], r"variants\.0\.budget: give kept_fraction or budget, one of them"),
        (
            ["variants", 0],
            {"method": "lorc", "schedule": "progressive", "kept_fraction": 0.75},
            "two are called lorc-progressive-0.75; give one",
        ),
        (
            ["evaluation", "texts", 0, "source"],
            "none.txt",
            r"evaluation\.texts\.0\.source: text file .*none.txt does not",
        ),
        (["evaluation", "texts", 0, "source"], "./a.csv", r"name must end in one of \.txt, \.jsonl"),
        (["gates"], {}, "gates: give max_perplexity_rise, min_recovery or both"),
        (["gates", "min_recovery"], 1.5, r"gates\.min_recovery: input should be less than or equal to 1"),
        (["cluster"], {"gpus": 8}, "cluster.gpu_memory_gib: gpus needs gpu_memory_gib"),
    ],
)
def test_a_wrong_field_is_named_with_what_is_allowed(content, load, tmp_path, path, value, message):
    set_at(content, path, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load(content)
    assert str(caught.value).startswith(f"{tmp_path / 'zoo.yaml'}: ")


def test_two_variants_of_one_label_need_a_name(content, load):
    content["variants"].append(
        {"method": "lorc", "schedule": {"name": "uniform", "rank_multiple": 8}, "kept_fraction": 0.9}
    )
    with pytest.raises(ConfigError, match=r"two are called lorc-uniform-0\.9; give one of them a name"):
        load(content)
    content["variants"][-1]["name"] = "lorc-by-8"
    assert variant_label(load(content).variants[-1], 0.9) == "lorc-by-8-0.9"


def test_two_methods_of_one_name_are_refused(content, load):
    for entry, reader in zip(content["variants"], ("none", "stacked"), strict=True):
        entry["method"] = {"name": "mine", "preset": "lorc", "values": {"reader": reader}}
    with pytest.raises(ConfigError, match="variants: two methods are called 'mine'"):
        load(content)


def test_a_wrong_entry_of_a_list_is_not_reported_as_a_short_list(content, load):
    content["variants"] = [{"method": "lork", "schedule": "uniform", "kept_fraction": [1.5]}]
    with pytest.raises(ConfigError) as caught:
        load(content)
    fields = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert fields == ["variants.0.method", "variants.0.kept_fraction.0"]


def test_all_that_is_wrong_is_told_at_once(content, load, tmp_path):
    """Fields, what one field holds, and what does not fit between those that are right: nothing waits for a cure."""
    content["models"][0]["dtype"] = "float8"
    content["models"] += [{"name": "x", "source": "./a"}, {"name": "x", "source": "./b"}]
    content["variants"][0] |= {"schedule": "unifrom", "kept_fraction": [1.5], "budget": {"memory_gib": 0}}
    content["variants"] += [
        {"method": {"name": "m", "preset": "lorc", "keys": {"blok": 1, "block": 3}, "values": {"reader": "all"}}},
        {"method": "kq_svd", "kept_fraction": 0.5},
        {"method": "lorc", "schedule": "fisher", "kept_fraction": 0.5},
    ]
    content["gates"] = {"min_recovery": 2}
    content["cluster"] = {"gpus": 8, "adress": "auto"}
    del content["evaluation"]["texts"]
    with pytest.raises(ConfigError) as caught:
        load(content)
    lines = [line.removeprefix(f"{tmp_path / 'zoo.yaml'}: ") for line in str(caught.value).splitlines()]
    assert [line.split(": ")[0] for line in lines] == [
        "models.0.dtype",
        "variants.0.schedule",
        "variants.0.kept_fraction.0",
        "variants.0.budget.memory_gib",
        "variants.0.budget.batch_size",
        "variants.0.budget.context_tokens",
        "variants.2.method",
        "variants.2.budget",
        "evaluation.texts",
        "gates.min_recovery",
        "cluster.gpu_memory_gib",
        "cluster.adress",
        "variants",
        "variants",
        "models",
    ]
    assert lines[6].split("; ") == [
        "variants.2.method: unknown field 'blok'",
        "keys allows statistics, reader, block, space, gqa, mean",
        "keys.block: Input should be a valid string",
        "values.reader: Input should be 'none', 'stacked', 'interaction' or 'gradient'",
    ]
    assert lines[-3:] == [
        "variants: kq_svd measures on text, but there is no calibration",
        "variants: schedule fisher measures on text, but there is no calibration",
        "models: the name 'x' is used twice",
    ]


def test_gates_may_be_absent(content, load):
    del content["gates"]
    assert load(content).gates is None


@pytest.mark.parametrize(("num_windows", "probe_windows"), [(12, 12), (128, 16)])
def test_probe_windows_that_are_not_written_fit_the_windows(content, load, num_windows, probe_windows):
    content["evaluation"]["texts"][0]["part"] = [0.25, 1]
    texts = [{"name": "c", "source": "text.jsonl", "part": [0, 0.25]}]
    content["calibration"] = {"texts": texts, "num_windows": num_windows}
    assert load(content).calibration.probe_windows == probe_windows
    content["calibration"] |= {"num_windows": 0}
    with pytest.raises(ConfigError) as caught:
        load(content)
    assert len(str(caught.value).splitlines()) == 1


def test_a_part_of_one_document_is_refused(content, load, tmp_path):
    (tmp_path / "text.txt").write_text("one\n\ntwo")
    content["evaluation"]["texts"][0] |= {"source": "text.txt", "part": [0.25, 1]}
    with pytest.raises(ConfigError, match=r"texts\.0\.part: a \.txt is one document, of which no part can be taken"):
        load(content)
    content["evaluation"]["texts"][0]["separator"] = "\n\n"
    assert load(content).evaluation.texts[0].part == (0.25, 1)


HEAVY = "torch", "transformers", "numpy", "ray", "mlflow", "pyarrow", "datasets"


def test_a_zoo_file_is_read_without_what_takes_seconds_to_import(tmp_path):
    script = f"import sys, pipeline.zoo.file; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "must be a mapping with the fields name, models"), ("a: [", "not YAML"), ("", "must be a mapping")],
)
def test_what_is_no_mapping_is_refused(tmp_path, text, message):
    (tmp_path / "zoo.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_zoo(tmp_path / "zoo.yaml")


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"zoo file .*none\.yaml does not exist"):
        load_zoo(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["demo.yaml", "hub.yaml", "methods.yaml"])
def test_the_examples_load(name):
    assert len(load_zoo(REPOSITORY / "examples" / name).models) >= 2
