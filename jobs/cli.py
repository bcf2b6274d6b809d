"""The `lorc` command. Exit codes: 0 all good, 1 a model or gate failed, 2 the request is wrong."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn

PIPELINE_PACKAGES = ("datasets", "mlflow", "pyarrow", "pydantic", "ray", "rich", "typer", "yaml")
if missing := [name for name in PIPELINE_PACKAGES if importlib.util.find_spec(name) is None]:
    sys.exit(f"error: the lorc command needs {', '.join(missing)}: in a checkout of lorc, pip install '.[pipeline]'")

import typer

from jobs.command import guarded
from pipeline.zoo.file import load_zoo

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

app = typer.Typer(
    help="Compress the KV caches of a zoo of language models, measure what it cost, register and promote the variants.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Benchmarks: figures as ratios within one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ZooFile = Annotated[Path, typer.Argument(metavar="ZOO", help="The zoo file (YAML).")]
Workdir = Annotated[
    str, typer.Option(help="Holds finished steps, tables and the default MLflow store: a directory, or a URL as s3://.")
]
SeenWorkdir = Annotated[str, typer.Argument(metavar="[WORKDIR]", help="The run's work directory, or URL.")]
WORKDIR = "lorc-work"
BenchModel = Annotated[Path | None, typer.Option(help="A model's directory; else random weights of --shape.")]
BenchVariant = Annotated[Path | None, typer.Option(help="One variant of it, instead of random factors.")]
BenchShape = Annotated[str, typer.Option(help="small, or llama-3-8b.")]
BenchLayers = Annotated[int | None, typer.Option(help="Fewer layers than the shape has.", min=1)]
BenchMlp = Annotated[int | None, typer.Option(help="Another MLP size than the shape's.", min=1)]
BenchDtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]


def tell_version(asked: bool) -> None:
    """Print the version and end, before any command."""
    if asked:
        print(f"lorc {importlib.metadata.version('lorc')}")
        raise typer.Exit()


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=tell_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """`debug` is read by `main` from the command line, since an error may come before any command."""


@app.command()
def plan(
    zoo: ZooFile,
    cluster: Annotated[Path | None, typer.Option(help="Simulate the whole run on the cluster of this file.")] = None,
    workdir: Workdir = WORKDIR,
) -> None:
    """Show what would run, what is done, and cache sizes before and after, from the configs alone."""
    checked = load_zoo(zoo)  # before what takes seconds to import
    from jobs.show.plan import show_plan

    raise typer.Exit(show_plan(checked, workdir, cluster))


@app.command()
def run(zoo: ZooFile, workdir: Workdir = WORKDIR) -> None:
    """Compress, evaluate and register everything in the zoo file; goes on where it was stopped."""
    run_until("register", zoo, workdir)


@app.command()
def compress(zoo: ZooFile, workdir: Workdir = WORKDIR) -> None:
    """Only decompose, schedule and write the variants."""
    run_until("compress", zoo, workdir)


@app.command()
def evaluate(zoo: ZooFile, workdir: Workdir = WORKDIR) -> None:
    """Compress and evaluate, without registering."""
    run_until("evaluate", zoo, workdir)


@app.command()
def register(zoo: ZooFile, workdir: Workdir = WORKDIR) -> None:
    """The same as run: compress, evaluate and register."""
    run_until("register", zoo, workdir)


@app.command()
def status(
    workdir: SeenWorkdir = WORKDIR,
    watch: Annotated[bool, typer.Option("--watch", help="Show it until the run ends.")] = False,
) -> None:
    """Show how a run stands, from any terminal, while it runs and after; exit code 1 if anything failed, or it died."""
    from jobs.show.status import show_status

    raise typer.Exit(show_status(workdir, watch=watch))


@app.command()
def logs(
    workdir: Annotated[str, typer.Argument(metavar="WORKDIR", help="The run's work directory, or URL.")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Its name in the zoo file.")],
    variant: Annotated[str | None, typer.Argument(metavar="[VARIANT]", help="Its label in the tables.")] = None,
) -> None:
    """Print the traces of the steps of a model that failed."""
    from jobs.show.logs import show_logs

    raise typer.Exit(show_logs(workdir, model, variant))


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(metavar="NAME", help="NAME (its candidate), NAME/VERSION or NAME@ALIAS.")],
    to: Annotated[str, typer.Option(help="The alias to move.")] = "champion",
    zoo: Annotated[Path | None, typer.Option(help="Take the gates from this zoo file instead.")] = None,
    workdir: Workdir = WORKDIR,
) -> None:
    """Make a registered variant the champion, if the gates accept it; the reasons of a refusal become tags."""
    checked = load_zoo(zoo) if zoo is not None else None
    from jobs.promote import promote_variant

    raise typer.Exit(promote_variant(reference, to, checked, workdir))


@app.command()
def regress(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Models; all champions if absent.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster; started here if absent.")] = None,
    workdir: Workdir = WORKDIR,
) -> None:
    """Evaluate the champions again on their pinned tokens and compare with their registered scores."""
    from jobs.regression_eval import regress_champions

    raise typer.Exit(regress_champions(names or [], address, workdir))


@app.command()
def generate(
    variant: Annotated[
        str, typer.Argument(help="A variant's or an export's directory, or NAME, NAME/VERSION, NAME@ALIAS.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    workdir: Workdir = WORKDIR,
) -> None:
    """Continue a text with a compressed cache, and say how many bytes it took and how fast it went."""
    from jobs.generate import generate_text

    raise typer.Exit(generate_text(variant, prompt, max_new_tokens, workdir))


@app.command()
def export(
    variant: Annotated[str, typer.Argument(help="A variant's directory, or NAME, NAME/VERSION, NAME@ALIAS.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    base: Annotated[Path | None, typer.Option(help="The base model, if not where it was.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="For transformers without lorc; per-head methods of one rank.")
    ] = False,
    workdir: Workdir = WORKDIR,
) -> None:
    """Write a standalone checkpoint that transformers loads without the base model."""
    from jobs.export_checkpoint import export_checkpoint

    raise typer.Exit(export_checkpoint(variant, directory, base, workdir, plain=plain))


@app.command()
def methods() -> None:
    """List the presets with their axes and sources."""
    from jobs.show.methods import show_methods

    raise typer.Exit(show_methods())


@app.command()
def spectrum(zoo: ZooFile, workdir: Workdir = WORKDIR) -> None:
    """Show per layer the conditions, effective ranks and ranks by schedule and, with calibration, the best preset."""
    checked = load_zoo(zoo)
    from jobs.show.spectrum import show_spectrum

    raise typer.Exit(show_spectrum(checked, workdir))


@bench.command("svd")
def bench_svd() -> None:
    """Our decomposition against numpy.linalg.svd on the key shapes of 8B, 13B and 70B models."""
    from jobs.bench.svd import main as bench_svd_main

    bench_svd_main()


@bench.command("scale")
def bench_scale(
    repeats: Annotated[int, typer.Option(help="Of the stage that two workers share with one.", min=1)] = 5,
) -> None:
    """What is read of a model of 70B, what a step costs beside its work, what a second worker is worth."""
    from jobs.bench.zoos.scale import main as bench_scale_main

    bench_scale_main(repeats)


@bench.command("decode")
def bench_decode(
    model: BenchModel = None,
    variant: BenchVariant = None,
    shape: BenchShape = "small",
    layers: BenchLayers = None,
    mlp: BenchMlp = None,
    dtype: BenchDtype = "float32",
    cache: Annotated[list[str], typer.Option(help="static, growing, or both.")] = ["static", "growing"],  # noqa: B006
    context: Annotated[list[int], typer.Option(help="Cached tokens; give several for a curve.")] = [8192],  # noqa: B006
    batch_size: Annotated[list[int], typer.Option(help="Rows; give several to compare.")] = [1],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="New tokens timed.", min=1)] = 16,
    prefill: Annotated[int, typer.Option(help="Tokens of the prefill.", min=1)] = 2048,
    plot: Annotated[Path | None, typer.Option(help="Draw speed and memory over the context to this .png.")] = None,
) -> None:
    """Tokens per second, prefill time and cache bytes of variants against the untouched model."""
    from jobs.bench.decode import Settings
    from jobs.bench.decode import main as bench_decode_main
    from jobs.bench.models import Subject

    subject = Subject(model, variant, shape, layers, mlp, dtype)
    bench_decode_main(subject, Settings(cache, context, batch_size, tokens, prefill), plot)


@bench.command("capacity")
def bench_capacity(
    model: BenchModel = None,
    variant: BenchVariant = None,
    shape: BenchShape = "small",
    layers: BenchLayers = None,
    mlp: BenchMlp = None,
    dtype: BenchDtype = "bfloat16",
    context: Annotated[int, typer.Option(help="Tokens that each row's cache holds.", min=1)] = 2048,
) -> None:
    """The largest batch that decodes on this GPU, of variants and of the untouched model, and its tokens per second."""
    from jobs.bench.capacity import main as bench_capacity_main
    from jobs.bench.models import Subject

    bench_capacity_main(Subject(model, variant, shape, layers, mlp, dtype), context)


@bench.command("scores")
def bench_scores(
    context: Annotated[int, typer.Option(help="Cached tokens.", min=512)] = 8192,
    batch_size: Annotated[int, typer.Option(help="Rows.", min=1)] = 1,
    dtype: BenchDtype = "float32",
) -> None:
    """Reading keys that are cached before the rotation: rebuilding them all against interpolation or the kernel."""
    from jobs.bench.scores import main as bench_scores_main

    bench_scores_main(context, batch_size, dtype)


@bench.command("calibrate")
def bench_calibrate() -> None:
    """Calibration against a plain forward pass over the same tokens, and its peak memory."""
    from jobs.bench.calibrate import main as bench_calibrate_main

    bench_calibrate_main()


@bench.command("units")
def bench_units(
    output: Annotated[Path | None, typer.Option(help="Write them to this file, for `lorc plan --cluster`.")] = None,
) -> None:
    """Unit costs of this machine: rates of linear algebra and of models, and what small steps take."""
    from jobs.bench.zoos.units import main as bench_units_main

    bench_units_main(output)


@bench.command("plan")
def bench_plan(
    units: Annotated[Path | None, typer.Option(help="Unit costs of this machine; measured now if absent.")] = None,
) -> None:
    """The simulated time of a local run against the measured one."""
    from jobs.bench.zoos.plan import main as bench_plan_main

    bench_plan_main(units)


def run_until(until: Literal["compress", "evaluate", "register"], zoo: Path, workdir: str) -> NoReturn:
    """Run a zoo file, which is read before what takes seconds to import."""
    checked = load_zoo(zoo)
    from jobs.compress_zoo import compress_zoo

    raise typer.Exit(compress_zoo(checked, workdir, until=until))


def main() -> None:
    """The console script."""
    guarded(app)


if __name__ == "__main__":
    main()
