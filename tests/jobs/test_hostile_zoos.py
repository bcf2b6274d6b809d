"""Hostile zoo files: each is refused in one line that names the field, with exit code 2, at once, and leaves nothing."""

import time

import pytest

PARTS = {
    "models": "models: [{name: m, source: ./model, dtype: float32}]",
    "variants": "variants: [{method: lorc, kept_fraction: 0.5}]",
    "evaluation": "evaluation: {texts: [{name: t, source: ./text.txt}], window_tokens: 16, num_windows: 2}",
    "gates": "gates: {max_perplexity_rise: 0.1}",
}
TEXT = "evaluation: {texts: [{name: t, source: ./text.txt%s}]%s}"
LAYERS = "variants: [{method: {name: a, preset: lorc, per_layer: {%s: lorc_q}}, kept_fraction: 0.5}]"
BUDGET = "variants: [{method: lorc, budget: {memory_gib: %s, batch_size: 1, context_tokens: 1}}]"
HOSTILE = {
    "an infinite budget": ({"variants": BUDGET % ".inf"}, "variants.0.budget.memory_gib: input should be a finite"),
    "a budget that is no number": ({"variants": BUDGET % ".nan"}, "variants.0.budget.memory_gib: input should be"),
    "infinite memory": (
        {"models": "models: [{name: m, source: ./model, resources: {memory_gib: .inf}}]"},
        "models.0.resources.memory_gib: input should be a finite number, got inf",
    ),
    "a million million layers": ({"variants": LAYERS % "0-999999999999"}, "per_layer: '0-999999999999' is no layer"),
    "many layers": ({"variants": LAYERS % "0-99999999"}, "no range of layers (0-2) below 1000"),
    "the home directory": ({"models": "models: [{name: m, source: '~'}]"}, "the home directory is no model's"),
    "nobody's home": ({"models": "models: [{name: m, source: '~nobody-here/x'}]"}, "no such home directory"),
    "a source of 5,000 characters": (
        {"models": f"models: [{{name: m, source: ./{'a' * 5000}}}]"},
        "models.0.source: string should have at most 4096 characters",
    ),
    "a file name of 500 characters": (
        {"evaluation": f"evaluation: {{texts: [{{name: t, source: ./{'a' * 500}.txt}}]}}"},
        "evaluation.texts.0.source: text file: File name too long",
    ),
    "a null character": ({"models": 'models: [{name: m, source: "./a\\0b"}]'}, "models.0.source: embedded null byte"),
    "a seed below 0": ({"evaluation": TEXT % ("", ", seed: -1")}, "evaluation.seed: input should be greater than"),
    "an empty separator": ({"evaluation": TEXT % (", separator: ''", "")}, "separator: string should have at least 1"),
    "a huge window": (
        {"evaluation": TEXT % ("", ", window_tokens: 99999999999999999999")},
        "evaluation.window_tokens: input should be less than or equal to 2147483647",
    ),
    "huge batches": ({"evaluation": TEXT % ("", ", batch_size: 999999999999")}, "evaluation.batch_size: input"),
    "a key twice": ({"more": "gates: {min_recovery: 0.9}"}, "the key 'gates' stands twice"),
    "an alias bomb": (
        {"more": "x: &a [1,1,1,1,1,1,1,1]\n" + "\n".join(f"x{i}: &x{i} [{','.join(['*a'] * 9000)}]" for i in range(3))},
        "more than 100,000 values",
    ),
    "depth": ({"more": "x: " + "[" * 5000}, "nested deeper than 32 levels"),
    "a number of 6,000 digits": ({"more": "x: " + "9" * 6000}, "4300 digits"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_zoo_is_refused_in_one_line_at_once(name, lorc, tmp_path):
    changed, message = HOSTILE[name]
    (tmp_path / "text.txt").write_text("import os\n")
    (tmp_path / "zoo.yaml").write_text("name: z\n" + "\n".join((PARTS | changed).values()) + "\n")
    started = time.process_time()
    code, out, err = lorc("run", tmp_path / "zoo.yaml", "--workdir", tmp_path / "work")
    assert time.process_time() - started < 2
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
    assert err.startswith(f"error: {tmp_path / 'zoo.yaml'}: ")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "zoo.yaml"]
