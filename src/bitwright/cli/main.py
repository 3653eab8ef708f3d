"""The command `bitwright`: finds the verb, loads its module, and turns every failure into one line.

A verb's module is imported when that verb is called, so that `bitwright --help` imports neither torch nor a model.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from bitwright.errors import BitwrightError, is_out_of_memory
from bitwright.version import __version__

#: Verb -> what it does, in the order of `--help`. A verb's file in this folder holds `run`, `HELP` and `EXAMPLES`.
VERBS = {
    "tune": "The main job: quantize, find what loses accuracy, repair it, export, prove.",
    "quantize": "Calibrate, export as Q/DQ pairs or in integers alone, and prove the files.",
    "verify": "Prove files again that quantize or tune wrote.",
    "calibrate": "Find the range of every value and write a calibration table.",
    "sensitivity": "Rank operators by what they lose at int8; leave the worst in float.",
    "search": "Search mixed precision: the cheapest plan for a target, or the best within a budget.",
    "luts": "Which look-up table loses accuracy, and the best table for it.",
    "train": "Quantization-aware training of a classifier, from a recipe.",
    "demo": "The whole story on two small networks; needs no model and no data.",
    "targets": "List the chips and engines to quantize for.",
}
PACKAGE = "bitwright.cli"
#: Exit status of bad input, of an interruption, and of a defect of ours.
BAD_INPUT = 2


def _dashed(token: str) -> str:
    """`--input_num` is `--input-num`."""
    return token.replace("_", "-")


CONTEXT = {"help_option_names": ["-h", "--help"], "token_normalize_func": _dashed}


class _Verbs(TyperGroup):
    """Verbs that are empty until called."""

    # The types of typer's own classes are private to it.
    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        return name, stub if name is None else _load(name), rest


app = typer.Typer(cls=_Verbs, subcommand_metavar="VERB ...", context_settings=CONTEXT, add_completion=False)


@app.callback(epilog="bitwright VERB --help explains a verb and its flags.")
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Takes a trained float network to fixed-point hardware and keeps its accuracy."""


def _placeholder() -> None:
    """Stands for a verb that is not loaded."""


for _verb, _line in VERBS.items():
    app.command(_verb, help=_line)(_placeholder)


def _load(verb: str) -> Any:
    """The command of *verb*, from its module."""
    module = import_module(f"{PACKAGE}.{verb}")
    paragraphs = [" ".join(part.split()) for part in module.HELP.split("\n\n")]
    epilog = "\n\n".join(["Examples:", *module.EXAMPLES])
    one = typer.Typer(add_completion=False)
    one.command(verb, help="\n\n".join(paragraphs), epilog=epilog, context_settings=CONTEXT)(module.run)
    return get_command(one)


def run(arguments: Sequence[str]) -> int:
    """Run the command line *arguments* (without the program's name). *returns* the exit status."""
    _quieten_libraries()
    try:
        return _dispatch(list(arguments) or ["--help"])
    except typer.Exit as e:
        return e.exit_code
    except typer.TyperException as e:
        return _fail(e, _usage_line(e))
    except BitwrightError as e:
        return _fail(e, f"error: {e}")
    except KeyboardInterrupt as e:
        return _fail(e, f"interrupted. {e}" if str(e) else "interrupted. No file was left half-written.")
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be flushed into the closed pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        return _fail(e, _unexpected(e))


def main() -> None:
    """Entry point of the command `bitwright`."""
    sys.exit(run(sys.argv[1:]))


def _dispatch(arguments: list[str]) -> int:
    # Typer's own `main` would turn Ctrl-C into an exit without a word.
    if arguments == ["--version"]:
        print(f"bitwright {__version__}")
        return 0
    with get_command(app).make_context("bitwright", arguments) as context:
        status = context.command.invoke(context)
    return status if isinstance(status, int) else 0


def _fail(error: BaseException, line: str) -> int:
    if os.environ.get("BITWRIGHT_TRACEBACK") == "1":
        traceback.print_exception(error)
    print("bitwright: " + " ".join(line.split()), file=sys.stderr)
    return BAD_INPUT


def _usage_line(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    path = "bitwright" if context is None else context.command_path
    message = error.format_message().rstrip(".?")
    end = "?" if error.format_message().endswith("?") else "."
    return f"error: {message}{end} See: {path} --help"


def _unexpected(error: Exception) -> str:
    """The line for an error that no part of Bitwright foresaw."""
    if is_out_of_memory(error):
        return (
            "error: memory: expected enough for this job; found none left. "
            "Use fewer samples (--input-num, --inference-num) or a smaller batch in the model."
        )
    if isinstance(error, OSError):
        where = error.filename or "files"
        return (
            f"error: {where}: expected a file system that reads and writes; found {error.strerror or error}. "
            "Check free space and permissions."
        )
    return (
        f"error: internal: expected no {type(error).__name__}; found {error}. "
        "This is a defect of Bitwright: run again with BITWRIGHT_TRACEBACK=1 and report what it prints."
    )


def _quieten_libraries() -> None:
    """Warnings of ours become notes; those of libraries are not for users."""
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("always", category=UserWarning, module=r"bitwright\b")
    warnings.showwarning = _show_note
    logging.disable(logging.WARNING)


def _show_note(message: Warning | str, *_: Any, **__: Any) -> None:
    print("bitwright: note: " + " ".join(str(message).split()), file=sys.stderr)
