"""Fail when an area that everything else rests on is covered below its floor.

python tests/check_coverage.py .coverage.json
"""

import json
import sys
from pathlib import Path

FLOOR_PERCENT = 90.0
AREAS = ("models", "adapt", "objectives", "data", "checkpoint", "infer", "posttrain", "serve")


def main() -> int:
    files = json.loads(Path(sys.argv[1]).read_text())["files"]
    failed = False
    for area in AREAS:
        summaries = [data["summary"] for name, data in files.items() if f"twofold/{area}/" in name]
        covered = sum(s["covered_lines"] for s in summaries)
        total = sum(s["num_statements"] for s in summaries)
        percent = 100.0 * covered / max(total, 1)
        is_low = percent < FLOOR_PERCENT
        failed |= is_low
        print(
            f"{area:12} {percent:5.1f}% of {total} lines{'  BELOW ' + str(FLOOR_PERCENT) if is_low else ''}"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
