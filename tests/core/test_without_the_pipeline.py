"""lorc_core stands alone: without Ray, MLflow and the pipeline."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("ray", "mlflow", "datasets", "pyarrow", "pipeline", "jobs"):
    sys.modules[name] = None  # importing it raises
import lorc_core
for name in lorc_core.__all__:
    getattr(lorc_core, name)
variant = lorc_core.compress(sys.argv[1])
model = lorc_core.attach  # resolved
print(variant)
"""


def test_lorc_core_compresses_where_the_pipelines_packages_are_absent(save_tiny):
    done = subprocess.run([sys.executable, "-c", SCRIPT, save_tiny("llama")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "96 of 192 floats per token (0.5000)" in done.stdout


def test_the_command_says_what_to_install_where_the_pipelines_packages_are_absent():
    """They are absent in `make test-core`; here their absence is feigned."""
    script = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda n: None if n == 'ray' else find(n); import jobs.cli"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the lorc command needs ")
    assert "ray" in done.stderr
    assert "in a checkout of lorc, pip install '.[pipeline]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_methods_and_schedules_are_known_without_torch():
    """A wrong zoo file is refused by what reads methods alone; torch and transformers take seconds to import."""
    script = "import sys, lorc_core.methods; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
