"""Every fault, and what came of it.

    python -m tests.faults [--long] [--only NAMES] [--seconds N] [--markdown]
    python -m tests.faults --soak MINUTES

Ends with status 1 when anything was lost or went wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.cases import CASES, SOAK, attempt
from tests.faults.table import EXAMPLES, Context, cells, markdown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--long", action="store_true", help="as often as the table in RELIABILITY.md says")
    parser.add_argument("--only", default="", help="cases whose names contain one of these, comma between")
    parser.add_argument("--seconds", type=float, help="a case that could go on for ever ends after these")
    parser.add_argument("--seed", type=int, default=1, help="another number: other random moments and inputs")
    parser.add_argument("--markdown", action="store_true", help="nothing but the table")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="only the whole daemon's traffic")
    asked = parser.parse_args()
    if asked.soak:
        asked.only, asked.seconds = SOAK, 60 * asked.soak
    parts = [part.strip() for part in asked.only.split(",") if part.strip()]
    known = [SOAK] if asked.soak else list(CASES)
    chosen = [name for name in known if not parts or any(part in name for part in parts)]
    if not chosen:
        parser.error(f"no case is called {asked.only}; there are: {', '.join(CASES)}")
    rows, clean = [], True
    for name in chosen:
        start = time.monotonic()
        with TemporaryDirectory(prefix="faults-") as folder:
            context = Context(Path(folder), asked.long, asked.seconds, seed=asked.seed)
            found = attempt(name, context)
        rows += [cells(part, row) for part, row in found.items()]
        clean &= all(row.is_clean for row in found.values())
        if not asked.markdown:
            print(f"{name}: {time.monotonic() - start:.0f} s")
            for part, row in found.items():
                for amiss in (*row.lost[:EXAMPLES], *row.wrong[:EXAMPLES]):
                    print(f"    {part}: {amiss}")
            sys.stdout.flush()
    print(markdown(rows))
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
