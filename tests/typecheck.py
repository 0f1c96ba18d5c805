"""Run mypy on the installed layout.

The repository keeps `passes/`, `kernels/` and `export/` beside `kvpass/`; they are imported as `kvpass.passes` and so
on. mypy looks at folders, so it gets a tree of links in the shape of the package.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("passes", "kernels", "export")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "kvpass"
        package.mkdir()
        for item in (ROOT / "kvpass").iterdir():
            if item.name != "__pycache__":
                (package / item.name).symlink_to(item)
        for name in FOLDERS:
            (package / name).symlink_to(ROOT / name)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "kvpass"]
        return subprocess.call(command, cwd=folder)


if __name__ == "__main__":
    sys.exit(main())
