"""The `kvsched` command. Each command imports what it needs when it runs."""

from __future__ import annotations

import shlex
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .errors import KVSchedError


class _Commands(TyperGroup):
    """Shows an error that kvsched raises on purpose as one message, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (KVSchedError, ImportError) as error:
            typer.echo(f"kvsched: {error}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    help="Load a long context's KV cache faster (SparKV), decode past what memory holds (DynaKV).",
    no_args_is_help=True,
    add_completion=False,
)
model = typer.Typer(help="Get the model that examples and tests use, or any other.", no_args_is_help=True)
app.add_typer(model, name="model")

trace = typer.Typer(help="Record what attention sees in a real run, and judge policies on it.", no_args_is_help=True)
app.add_typer(trace, name="trace")

_SUITES = sorted(path.stem for path in Path(str(files("kvsched_evals") / "suites")).glob("*.yaml"))
evaluate = typer.Typer(help="Measure answers through the caches and their peers: quality, bytes, seconds.")
app.add_typer(evaluate, name="eval", no_args_is_help=True)

_Name = Annotated[str | None, typer.Argument(help="A folder or a name on the hub; without it the default model.")]


@model.command("fetch")
def model_fetch(name: _Name = None) -> None:
    """Download a model, convert it where needed, and print its folder."""
    from .hub import fetch_model

    typer.echo(fetch_model(name))


@model.command("path")
def model_path(name: _Name = None) -> None:
    """Print the folder of a model that is already here; fail without one."""
    from .hub import DEFAULT_MODEL, find_model

    folder = find_model(name)
    if folder is None:
        typer.echo(f"{name or DEFAULT_MODEL} is not on this machine: run `kvsched model fetch`.", err=True)
        raise typer.Exit(1)
    typer.echo(folder)


@app.command()
def serve(
    directory: Annotated[Path, typer.Argument(help="The published folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.", min=0, max=65535)] = 8000,
) -> None:
    """Serve a published folder over HTTP, read-only, for development."""
    from .sparkv.serve import serve as run

    run(directory, host, port)


@app.command()
def publish(
    document: Annotated[Path, typer.Argument(help="A text, or a .json file that holds one list of token ids.")],
    store: Annotated[str | None, typer.Option(help="A folder, file:///folder or s3://bucket/path.")] = None,
    name: Annotated[str | None, typer.Option("--model", help="A folder or a name on the hub.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of SparKV options.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, write nothing.")] = False,
) -> None:
    """Compute a document's KV cache and put it into a store, for SparKV to load."""
    from .config import SparKVConfig
    from .hub import load_model
    from .sparkv.publish import publish as run
    from .sparkv.publish import read_token_ids

    options = SparKVConfig() if config is None else SparKVConfig.from_yaml(config)
    model, tokenizer = load_model(name)
    report = run(model, read_token_ids(document, tokenizer), store, options, dry_run)
    typer.echo(
        f"{'would write' if dry_run else 'wrote'} {report.chunks_written} of {report.chunks} chunks, "
        f"{'about ' if dry_run else ''}{report.bytes_written / 1e6:.1f} MB, for {report.tokens} tokens "
        f"({report.kv_bytes / 1e6:.1f} MB of keys and values) in {report.seconds:.1f} s"
    )


@app.command()
def gc(
    store: Annotated[str, typer.Argument(help="A folder, file:///folder or s3://bucket/path.")],
    older_than: Annotated[str | None, typer.Option(help="Delete prefixes last extended before that: 12h, 30d.")] = None,
    max_size: Annotated[str | None, typer.Option(help="Delete the oldest prefixes until the rest fits: 10GB.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, delete nothing.")] = False,
) -> None:
    """Delete old prefixes from a store, and what interrupted publications left there."""
    from .config import parse_bytes, parse_duration
    from .sparkv.gc import collect
    from .sparkv.store import Store

    age = None if older_than is None else parse_duration(older_than)
    size = None if max_size is None else parse_bytes(max_size)
    report = collect(Store(store), age, size, dry_run=dry_run)
    typer.echo(
        f"{'would delete' if dry_run else 'deleted'} {report.manifests} manifests and {report.chunks} chunks, "
        f"{report.bytes_freed / 1e6:.1f} MB; {report.bytes_kept / 1e6:.1f} MB stay"
    )


@app.command()
def profile(
    name: _Name = None,
    chunk_tokens: Annotated[int, typer.Option(help="Tokens in a chunk, as in SparKVConfig.", min=16, max=65536)] = 256,
    learned: Annotated[
        int | None, typer.Option(help="Train the cost model `learned` too, on prefills of so many tokens.", min=32)
    ] = None,
) -> None:
    """Measure how fast this device computes a model's KV cache, and keep that for SparKV's plans."""
    from .hub import load_model
    from .sparkv.cost import DeviceProfile
    from .sparkv.grid import Grid
    from .sparkv.predictor import LearnedProfile

    model, _ = load_model(name)
    measured = DeviceProfile.renew(model, chunk_tokens)
    layers = len(measured.base) - 1
    depths = sorted({round(layers * part / 4) for part in (1, 2, 3, 4)})
    typer.echo(f"seconds to compute a chunk of {chunk_tokens} tokens")
    typer.echo("tokens before it" + "".join(f"{f'{depth} layers':>12}" for depth in depths) + f"{'tokens/s':>12}")
    table = measured.compute_seconds(Grid(33, chunk_tokens, layers))
    for chunk in (0, 8, 16, 32):
        seconds = table[chunk]
        row = "".join(f"{seconds[depth]:12.3f}" for depth in depths)
        typer.echo(f"{chunk * chunk_tokens:16}{row}{chunk_tokens / seconds[-1]:12.0f}")
    if learned is not None:
        trained = LearnedProfile.renew(model, Grid(max(1, learned // chunk_tokens), chunk_tokens, layers))
        seconds = trained.compute_seconds(Grid(len(trained.blocks), chunk_tokens, layers))
        typer.echo(f"learned, for {len(trained.blocks) * chunk_tokens} tokens: {seconds[:, -1].sum():.1f} s")


@app.command()
def calibrate(
    name: Annotated[str | None, typer.Option("--model", help="A folder or a name on the hub.")] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; without it, the Python language reference.")] = None,
    store: Annotated[str | None, typer.Option(help="Also put it into this store, beside the model's chunks.")] = None,
) -> None:
    """Measure how finely a model's keys and values have to be kept, for the codecs balanced, small and progressive."""
    from .hub import load_model
    from .sparkv.calibration import Calibration, calibration_path, read_texts
    from .sparkv.store import Store

    model, tokenizer = load_model(name)
    texts, source = read_texts(text, tokenizer)
    calibration = Calibration.measure(model, texts, source)
    typer.echo(calibration.keep())
    if store is not None:
        Store(store, writable=True).put(calibration_path(calibration.id), calibration.to_bytes())


@trace.command("record")
def trace_record(
    document: Annotated[Path, typer.Argument(help="A text, or a .json file that holds one list of token ids.")],
    output: Annotated[Path, typer.Argument(help="The trace to write, a safetensors file.")],
    prompt_length: Annotated[int, typer.Option(help="Tokens that count as the prompt.", min=1)] = 1024,
    tokens: Annotated[int | None, typer.Option(help="Take that many tokens of the text.", min=2)] = None,
    name: Annotated[str | None, typer.Option("--model", help="A folder or a name on the hub.")] = None,
) -> None:
    """Run a text through a model and write queries, keys and values of its full-attention layers, in float16."""
    from .hub import load_model
    from .sparkv.publish import read_token_ids
    from .trace import record

    model, tokenizer = load_model(name)
    made = record(model, read_token_ids(document, tokenizer)[0, :tokens], prompt_length, output)
    typer.echo(f"{made.path}: {made.tokens} tokens, {made.prompt_length} of them prompt, {len(made.layers)} layers")


@trace.command("replay")
def trace_replay(
    file: Annotated[Path, typer.Argument(help="A trace, as `kvsched trace record` writes it.")],
    policy: Annotated[list[str] | None, typer.Option(help="Which to replay; repeat it. Without it, dynakv.")] = None,
    budget: Annotated[int, typer.Option(help="Tokens per KV head beside sinks and recent ones.", min=0)] = 256,
    sinks: Annotated[int, typer.Option(help="First tokens that always take part.", min=0)] = 16,
    recent: Annotated[int, typer.Option(help="Newest tokens that always take part.", min=1)] = 64,
    every: Annotated[int, typer.Option(help="Measure every so many steps, the first included.", min=1)] = 64,
    layers: Annotated[str | None, typer.Option(help="Numbers of layers, as in 0,6,12; without it, all.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of further DynaKV options.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all rows there.")] = None,
) -> None:
    """Decode a trace again by one or more policies and compare each step with exact attention."""
    from .config import DynaKVConfig
    from .replay import configured, replay, select_layers, table, write_rows
    from .trace import Trace

    base = DynaKVConfig() if config is None else DynaKVConfig.from_yaml(config)
    base = DynaKVConfig.merge(base, {"budget": budget, "sinks": sinks, "recent": recent})
    configs = [configured(name, base) for name in dict.fromkeys(policy or ["dynakv"])]
    recorded = Trace.open(file)
    chosen = select_layers(recorded, layers)
    outcomes = [replay(recorded, one, chosen, every) for one in configs]
    if json_file is not None:
        write_rows(outcomes, json_file)
    typer.echo(table(outcomes))


@evaluate.command("run")
def eval_run(
    suite: Annotated[str, typer.Argument(help=f"{', '.join(_SUITES)}, or a YAML file like those in configs/evals.")],
    out: Annotated[
        Path | None, typer.Option(help="The result file, <suite>.jsonl without it; an unfinished one grows.")
    ] = None,
    name: Annotated[str | None, typer.Option("--model", help="A folder or a name on the hub.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Questions of each task at most; a higher limit may follow.", min=1)
    ] = None,
) -> None:
    """Ask a suite's questions through all of its caches; interrupted, the same command goes on."""
    try:
        from kvsched_evals.run import run
        from kvsched_evals.suite import Suite
    except ImportError as error:
        raise ImportError(f"{error}. Evaluations need: pip install 'kvsched[eval]'.") from error
    from .hub import load_model

    read = Suite.load(suite)
    model, tokenizer = load_model(name)
    path = out or Path(f"{read.name}.jsonl")
    run(read, model, tokenizer, path, shlex.join(["kvsched", *sys.argv[1:]]), typer.echo, limit)
    typer.echo(path)


@evaluate.command("report")
def eval_report(
    files: Annotated[list[Path], typer.Argument(help="Finished result files.")],
    out: Annotated[Path, typer.Option(help="The page to write; its table stands beside it as Markdown.")] = Path(
        "report.html"
    ),
) -> None:
    """Make one page and one table of result files."""
    from kvsched_evals.report import write

    typer.echo(write(files, out))
