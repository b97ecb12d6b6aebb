"""Both stages, start to finish, on data that is made here and with nothing from the Hub."""

from zoft.demo.job import DemoResult, DemoRun, run, smollm2

__all__ = ["DemoResult", "DemoRun", "run", "smollm2"]
