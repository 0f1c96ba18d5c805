"""The table of which passes compose (docs/plans.md), from `tests/algebra.py`.

python -m benchmarks.plans [--write docs/plans.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Print which passes compose.")
    parser.add_argument("--write", metavar="FILE", type=Path, help="write the page there")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    import algebra

    text = algebra.document(algebra.model().plan)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
