"""The `kvsched` command. Each command imports what it needs when it runs."""

from __future__ import annotations

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
