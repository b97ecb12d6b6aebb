"""The exact head as a part of a method: ``mezo+head`` is MeZO with `ExactHead` (`zoft.optim.core.exact`)."""

from zoft.optim.core.method import Method

METHOD = Method(
    "head",
    "the head along its exact gradient, MeZO below it (--exact head)",
    "arXiv 2501.04287",
    exact=True,
)
