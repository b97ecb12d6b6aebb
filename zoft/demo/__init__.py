"""Demo: both stages from start to finish, on generated data and without the Hub."""

from zoft.demo.job import DemoResult, DemoRun, run, smollm2

__all__ = ["DemoResult", "DemoRun", "run", "smollm2"]
