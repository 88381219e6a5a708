"""Entry point: every failure is one sentence and an exit status, never a traceback."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings

from hesscope.cli import ranks
from hesscope.cli.resuming import Stopped
from hesscope.errors import HesscopeError, HesscopeWarning, RankLost

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed (or a verification that did not pass), 2 bad input."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter is no reason to fail
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """The exit status of one command."""
    from hesscope.cli.app import app

    _quieten()
    try:
        status = app(args=arguments, prog_name="hesscope", standalone_mode=True)
    except RankLost as lost:
        return _say(str(lost), FAILURE)
    except HesscopeError as error:
        return _say(str(error), BAD_INPUT)
    except Stopped as stop:
        return _say(str(stop), INTERRUPTED) if ranks.speaks() else INTERRUPTED
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        sys.stderr.close()
        return FAILURE
    except SystemExit as stop:
        # Typer turns Ctrl-C into an exit of its own.
        return _interrupted() if stop.code == INTERRUPTED else _status(stop.code)
    except Exception as error:
        if os.environ.get("HESSCOPE_TRACEBACK"):
            raise
        return _say(_unexpected(error), FAILURE)
    return _status(status)


def _interrupted() -> int:
    return _say("Interrupted; no result was left half-written.", INTERRUPTED) if ranks.speaks() else INTERRUPTED


def _unexpected(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if "out of memory" in reason or isinstance(error, MemoryError):
        return f"Out of memory ({reason}); lower --batch-size or --length, or select fewer parameters."
    return f"{reason} (set HESSCOPE_TRACEBACK=1 to see where)"


def _say(sentence: str, status: int) -> int:
    ranks.say(sentence)
    return status


def _status(code: object) -> int:
    return code if isinstance(code, int) else 0 if code is None else FAILURE


def _quieten() -> None:
    """Our own warnings in one line; other libraries' progress bars and notices off, unless asked for."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch is not loaded yet; what fails is raised, too
    warnings.simplefilter("ignore")
    warnings.simplefilter("always", HesscopeWarning)
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, HesscopeWarning):
        print(f"hesscope: warning: {message}", file=sys.stderr)
