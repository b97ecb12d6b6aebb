"""``python -m benchmarks.fuzz``: 100,000 damaged files of every kind; exits 1 if one breaks a reader."""

import argparse
import json
import resource
import sys
import time

from benchmarks.fuzz.run import EXTRA_MEMORY, KINDS, fuzz, limited_memory


def main() -> int:
    """Read damaged files of every kind; print one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000, help="of each kind (default: %(default)s)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument("--slowest", type=float, default=5.0, help="seconds a file may take (default: %(default)s)")
    asked = parser.parse_args()
    for kind in KINDS:
        fuzz(kind, 20)  # what is loaded once is not a leak of a reader
    before, broken, results = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, False, {}
    for kind in asked.kind or KINDS:
        begin = time.perf_counter()
        with limited_memory():
            report = fuzz(kind, asked.mutations, asked.seed)
        for failure in report.failures[:20]:
            print(failure, file=sys.stderr)
        broken |= bool(report.failures) or report.slowest > asked.slowest
        results[kind] = {
            **report.outcomes,
            "broken": len(report.failures),
            "slowest_seconds": round(report.slowest, 3),
            "seconds": round(time.perf_counter() - begin, 1),
        }
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(json.dumps({**results, "memory_grown_bytes": grown, "memory_limit_bytes": EXTRA_MEMORY}))
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
