"""Run by `tests/noise/test_fused.py` in a process of its own: Triton asks for its interpreter when it is imported."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
