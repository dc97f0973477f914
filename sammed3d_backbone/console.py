"""What commands and recipes say: errors in one line with an exit code, and progress."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

DEBUG_VARIABLE = "SAMMED3D_DEBUG"
MAX_CHARACTERS = 500  # per line of a message, since messages repeat input of any length
MAX_LINES = 100
# White space but for plain spaces, control characters, and those that turn the direction of text.
CONTROL = re.compile(r"[^\S \n]|[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
EXPECTED = (ValueError, OSError, FloatingPointError)  # what the package raises on purpose


def run_program(call: Callable[[], object], name: str) -> int:
    """Calls a program's body and turns whatever it raises into a line on standard error.

    With ``SAMMED3D_DEBUG=1`` exceptions pass through, so that Python prints their traceback.

    Args:
        call: The body; an int that it returns is the exit code.
        name: Name of the program, printed before the message.

    Returns:
        The exit code: 2 after an error, 130 after Ctrl-C.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    output = _Plain(sys.stdout) if sys.stdout else None  # None if it is closed
    try:
        with contextlib.redirect_stdout(cast("TextIO", output)):
            code = call()
        if output:
            output.flush()  # a full disk is an error, too
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        _say(f"{name}: interrupted")
        return 130
    except Exception as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        text = reason(error)
        if isinstance(error, MemoryError):
            text += "; there is not enough memory for this input: give a smaller one"
        elif not isinstance(error, EXPECTED):
            text += (
                "; this error was not expected: check the input, or set "
                f"{DEBUG_VARIABLE}=1 and report the traceback"
            )
        _say(f"{name}: error: {text}")
        if output:
            with contextlib.suppress(OSError):
                output.flush()
        return 2


def _has_folder() -> bool:
    """Whether the folder that the program runs in still exists."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def reason(error: Exception) -> str:
    """The message of an exception, shortened; with its class, in one line, if it is not ours."""
    text = shortened(str(error))
    if isinstance(error, FileNotFoundError) and not _has_folder():
        text += "; the current folder was removed: change to one that exists"
    if isinstance(error, EXPECTED):
        return text
    return " ".join(f"{type(error).__name__}: {text.strip() or 'no message'}".split("\n"))


@contextlib.contextmanager
def optional(output: object) -> Iterator[None]:
    """Turns an error while an optional output is made into a warning, so that the result is kept.

    Args:
        output: The file, for the warning.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 (the result is kept in any case)
        logger.warning("%s is not written: %s", output, reason(error))


def progress_bar(
    items: Iterable[Any] | None = None,
    *,
    desc: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    shown: bool = True,
) -> tqdm[Any]:
    """A bar on standard error, or one line at the beginning if that is not a terminal."""
    from tqdm import tqdm

    bar = tqdm(items, desc, total, unit=unit, initial=initial, disable=None if shown else True)
    if shown and bar.disable:
        _say(f"{desc}: {bar.total} {unit}s" + (f", from {initial} on" if initial else ""))
    return bar


def shortened(text: str) -> str:
    """A message with long and many lines cut, and control characters shown."""
    lines = _shown(text).split("\n")
    cut = [
        line
        if len(line) <= MAX_CHARACTERS
        else f"{line[: MAX_CHARACTERS // 2]} [... {len(line) - MAX_CHARACTERS} characters ...] "
        f"{line[-MAX_CHARACTERS // 2 :]}"
        for line in lines[:MAX_LINES]
    ]
    if len(lines) > MAX_LINES:
        cut.append(f"  ... and {len(lines) - MAX_LINES} more lines")
    return "\n".join(cut)


class _Plain:
    """A stream that shows control characters instead of sending them to the terminal.

    Names of classes, objects and cases, and the metadata of weights, come from other people's files
    and could move the cursor, change colours or hide text. Once nobody reads the stream, as after
    `| head`, output is discarded, and the program still finishes.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text with its control characters shown."""
        with self._discarding():
            self._stream.write(_shown(text))
        return len(text)

    def flush(self) -> None:
        """Writes out what was printed."""
        with self._discarding():
            self._stream.flush()

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        """Discards what cannot be written, or Python would try to write it again at exit."""
        try:
            yield
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if not isinstance(error, BrokenPipeError):
                raise

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def _shown(text: str) -> str:
    """Text whose control characters are written as escapes, but for the ends of lines."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _say(text: str) -> None:
    """Prints to standard error, whatever its encoding."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
