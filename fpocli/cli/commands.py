"""The command line: flags -> config -> one call. Errors are a sentence, a hint and exit code 2."""

import dataclasses
import inspect
import io
import logging
import os
import sys
from importlib import metadata
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

import fpocli
from fpocli.cli.defaults import CONFIG, PRESET
from fpocli.cli.examples import examples
from fpocli.cli.flags import GroupedCommand, flags_of
from fpocli.config import (
    CacheConfig,
    CompareConfig,
    ContrastConfig,
    DiffConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    FindConfig,
    InspectConfig,
    ReportConfig,
    SaesConfig,
    ShowConfig,
    SteerConfig,
    TrainConfig,
    override,
)
from fpocli.system.console import show_error
from fpocli.system.errors import FULL, UserError
from fpocli.system.launch import launch
from fpocli.system.output import output, write_json
from fpocli.system.ranks import tell_once
from fpocli.system.signals import add_resume_note, suppress_stop_message

app = typer.Typer(
    name="fpo",
    help="Feature-level Preference Optimization: cache a frozen reference once, then train the "
    "policy alone.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

features = typer.Typer(
    help="See single features: what they fire on, what they separate, what training changed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(features, name="features")


def _print_version(value: bool) -> None:
    if value:
        print(metadata.version("fpocli"))
        raise typer.Exit


_DRY_RUN = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Read and tokenise the first 1,000 rows, show the first pairs as the model will see "
        "them and what is dropped, and end. No model is loaded.",
    ),
]

# Flags of every command, which change no result and so are no settings.
_OUTPUT = {
    "quiet": Annotated[
        bool, typer.Option("--quiet", help="Print warnings and errors only, beside the data.")
    ],
    "json_logs": Annotated[
        bool,
        typer.Option(
            "--json-logs",
            help="Print each message, and progress now and then, as a JSON object on a line of "
            "stderr.",
        ),
    ],
}


def _command(
    name: str, function: str, config: type, extra: dict[str, Any], to: typer.Typer = app
) -> None:
    """Add `fpo NAME`, whose flags are the fields of `config`.

    Args:
        name: of the command.
        function: what it calls, by its name in fpocli.
        config: that function's dataclass.
        extra: flags that set defaults of others, by name.
        to: what the command is added to: fpo, or a group of its commands.
    """

    def run(context: typer.Context, **flags: Any) -> None:
        settings = {field.name: flags[field.name] for field in dataclasses.fields(config)}
        typed = {
            name: value
            for name, value in settings.items()
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
        }
        if (context.default_map or {}).get("overwrite"):
            add_resume_note(
                f"after removing overwrite from {flags['config']}, which would start over"
            )
        output.quiet, output.json_logs = flags["quiet"], flags["json_logs"]
        if output.flags():
            # tqdm's bars, of downloads for example.
            os.environ["TQDM_DISABLE"] = "1"
        try:
            made = config(**override(settings, typed))
            if isinstance(made, TrainConfig) and made.gpus:
                launch(made.gpus, made.device)
            getattr(fpocli, "preview" if flags.get("dry_run") else function)(made)
        except UserError as error:
            _fail(str(error), error.hint)
        except OSError as error:
            if error.errno in FULL:
                # Of a copy, filename2 is the file being written.
                path = error.filename2 or error.filename or settings.get("out") or "a file"
                _fail(
                    f"{path} cannot be written: {os.strerror(error.errno)}",
                    "free some space and run the same command again",
                )
            if error.filename is None:
                raise
            _fail(f"{error.filename}: {error.strerror}", "check the path and its permissions")

    flags = flags_of(config)
    flags |= {name: (kind, None) for name, kind in extra.items()}
    flags |= {name: (kind, False) for name, kind in _OUTPUT.items()}
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
            )
        ]
        + [
            inspect.Parameter(
                flag, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
            for flag, (kind, default) in flags.items()
        ]
    )
    run.__annotations__ = {"context": typer.Context}
    run.__annotations__ |= {flag: kind for flag, (kind, _) in flags.items()}
    text = inspect.cleandoc(config.__doc__ or "")
    to.command(name, cls=GroupedCommand, help=text, epilog=examples(name))(run)


def _fail(message: str, hint: str) -> None:
    suppress_stop_message()
    tell_once(message, lambda: show_error(message, hint))
    raise typer.Exit(2)


_command("cache", "cache", CacheConfig, {"config": CONFIG, "dry_run": _DRY_RUN})
_command("train", "train", TrainConfig, {"config": CONFIG, "preset": PRESET})
_command("eval", "evaluate", EvalConfig, {"config": CONFIG})
_command("compare", "compare", CompareConfig, {})
_command("inspect", "inspect", InspectConfig, {})
_command("saes", "saes", SaesConfig, {})
_command("doctor", "doctor", DoctorConfig, {})
_command("report", "report_runs", ReportConfig, {})
_command("export", "export", ExportConfig, {})
_command("contrast", "contrast", ContrastConfig, {}, features)
_command("find", "find", FindConfig, {}, features)
_command("show", "show", ShowConfig, {}, features)
_command("diff", "diff", DiffConfig, {}, features)
_command("steer", "steer", SteerConfig, {}, features)


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Parse the command line and run the command."""
    # On a terminal with another encoding, a character it lacks becomes "?" instead of an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.stderr.isatty():
        # In a log file tqdm's bars would be one long line.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # Otherwise torch prints C++ frames for every message that a lost process does not receive.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # DeepSpeed warns that there is no GPU whenever a library imports it, and of RMSprop under ZeRO.
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: (
            "Setting accelerator" not in record.getMessage()
            and "untested optimizer" not in record.getMessage()
        )
    )
    # When it is imported, it warns that a kernel on the hub cannot be loaded, which is not wanted.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    json_logs = "--json-logs" in sys.argv
    try:
        sys.exit(app(standalone_mode=not json_logs))
    except TyperException as error:
        # A mistake in the flags; without --json-logs typer prints it and exits.
        write_json("error", message=error.format_message(), hint="--help lists the flags")
        sys.exit(error.exit_code)
