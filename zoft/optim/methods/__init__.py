"""The methods by name. One file a method: its parts, and at its end ``METHOD``, its entry in this table."""

import difflib
import importlib
import pkgutil

from zoft.errors import ConfigError
from zoft.optim.core.method import Method, combined


def _entries() -> list[Method]:
    """The entries at the end of the files of this folder: MeZO, the others by name, then the first-order bounds."""
    files = (importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__))
    found: list[Method] = [file.METHOD for file in files]
    return sorted(found, key=lambda method: (method.first_order, method.name != "mezo", method.name))


METHODS: dict[str, Method] = {method.name: method for method in _entries()}


def get_method(name: str) -> Method:
    """Return the method called ``name``; an unknown name is a `ConfigError` that lists what there is.

    Names joined by ``+`` are a combination of their parts, with the published settings of the first.

    >>> [part.__name__ for part in get_method("lezo+mezo-adam").parts]
    ['Layers', 'AdamSteps']
    """
    names = name.split("+")
    for one in names:
        if one not in METHODS:
            close = difflib.get_close_matches(one, METHODS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(f"no method {one!r}; {hint}There are: {', '.join(METHODS)}")
    return METHODS[name] if len(names) == 1 else combined(name, [METHODS[one] for one in names])
