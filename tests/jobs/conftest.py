"""The `lorc` command in this process, and a variant to give it."""

import sys

import pytest

from jobs.cli import main
from lorc_core.compression import compress
from tests.models import save_tiny_model


@pytest.fixture
def lorc(monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output and standard error."""

    def lorc(*arguments):
        monkeypatch.setattr(sys, "argv", ["lorc", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return lorc


@pytest.fixture
def variant_dir(tmp_path):
    """A variant of a tiny model that is beside it."""
    variant = compress(save_tiny_model("llama", tmp_path / "base"), "lorc", 0.5, "uniform")
    variant.save(tmp_path / "variant")
    return tmp_path / "variant"
