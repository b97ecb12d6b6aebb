"""Tests that `tests/noise/test_fused.py` runs in a separate process: Triton chooses its interpreter on import."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
