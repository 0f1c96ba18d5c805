"""Files of the docs that are made from the code: written, or checked to be what would be written."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path


def write_or_check(description: str, module: str, made: Callable[[], Iterable[tuple[Path, str]]]) -> int:
    """The command line of such a module; its exit status.

    Args:
        description: what it makes.
        module: what to run where a file is out of date.
        made: every file and its text.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="exit 1 where a file on disk would change")
    check = parser.parse_args().check
    stale = []
    for path, text in made():
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    for name in stale:
        print(f"{name} is out of date: python -m {module}")
    return int(bool(stale))
