"""Read a pickle without running it: a description of what it would build.

A pickle is a program for a stack machine that may call anything. Here its instructions are interpreted one by one:
those needed for plain values and modules of torch push values, or inert notes of what they would build. Nothing is
imported or called; any other instruction or name is an error.
"""

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from zoft.errors import CardError, shown

MOST_INSTRUCTIONS = 10_000_000
_DICT = "collections.OrderedDict"
_MARK = object()


@dataclass(frozen=True)
class Name:
    """The name of a class or function in the pickle; never looked up."""

    text: str


@dataclass
class Note:
    """An object that the pickle would have built: its class or function, arguments and attributes."""

    what: str
    arguments: tuple[Any, ...]
    attributes: Any = None


def read_pickle(program: bytes, known: Collection[str]) -> Any:
    """Return the value of the pickle ``program``, with a `Note` in place of every object.

    ``known`` are the classes and functions that it may name, ``module.name``. ``OrderedDict()`` becomes a dict.

    Raises:
        CardError: another name or instruction, or a damaged pickle.

    >>> import pickle
    >>> read_pickle(pickle.dumps({"a": (7, None)}), known=())
    {'a': (7, None)}
    """
    machine = _Machine(known)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if count >= MOST_INSTRUCTIONS:
                raise CardError("the pickle has more instructions than any tuner needs")
            if opcode.name == "STOP":
                return machine.pop()
            step = _STEPS.get(opcode.name)
            if step is None:
                raise CardError(
                    f"the pickle uses the instruction {opcode.name}, which no tuner needs; nothing in it was run"
                )
            step(machine, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CardError(f"the pickle is damaged ({shown(str(error))}); download it again") from error
    raise CardError("the pickle is damaged (it does not end); download it again")


class _Machine:
    """Stack and memory of a pickle."""

    def __init__(self, known: Collection[str]) -> None:
        self.known = {*known, _DICT}
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def pop(self) -> Any:
        """Take the topmost value."""
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def since_mark(self) -> list[Any]:
        """Take all values above the last mark, and the mark."""
        values: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def remember(self, key: int) -> None:
        """Keep the topmost value under ``key``."""
        self.memory[key] = self.stack[-1]

    def tuple_of(self, length: int) -> None:
        """Make one tuple of the topmost values."""
        values = [self.pop() for _ in range(length)]
        self.push(tuple(values[::-1]))

    def set_items(self, pairs: list[Any]) -> None:
        """Put keys and values, one after the other, into the topmost dictionary."""
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise ValueError("items for a value that is not a dictionary")
        if not all(isinstance(key, str) for key in pairs[::2]):  # hashing deeply nested tuples could crash the process
            raise ValueError("a key that is not text")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        """Append ``values`` to the topmost list."""
        if not isinstance(self.stack[-1], list):
            raise ValueError("items for a value that is not a list")
        self.stack[-1].extend(values)

    def name(self, module: Any, name: Any) -> None:
        """Note a class or function, if a tuner has it."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is not text")
        text = f"{module}.{name}"
        if text not in self.known:
            raise CardError(
                f"the pickle asks for {shown(text)}, which is not part of a tuner: a pickle can run any program, so it "
                "was refused, and nothing in it was run"
            )
        self.push(Name(text))

    def call(self) -> None:
        """Note the object that a call would have built."""
        arguments, what = self.pop(), self.pop()
        if not isinstance(what, Name) or not isinstance(arguments, tuple):
            raise ValueError("a call of a value that is not a function")
        if what.text == _DICT and not arguments:
            self.push({})
        else:
            self.push(Note(what.text, arguments))

    def attributes(self) -> None:
        """Note the attributes of the topmost object."""
        attributes = self.pop()
        if not isinstance(self.stack[-1], Note) or self.stack[-1].attributes is not None:
            raise ValueError("attributes for a value that is not an object")
        self.stack[-1].attributes = attributes

    def stored(self) -> None:
        """Note a reference to the bytes of a tensor."""
        self.push(Note("storage", self.pop()))


def _constant(value: Any) -> Callable[[_Machine, Any], None]:
    return lambda machine, argument: machine.push(value() if callable(value) else value)


_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        lambda machine, argument: machine.push(argument),
    ),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda machine, argument: machine.remember(argument)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda machine, argument: machine.push(machine.memory[argument])),
    "MEMOIZE": lambda machine, argument: machine.remember(len(machine.memory)),
    "MARK": lambda machine, argument: machine.push(_MARK),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_LIST": _constant(list),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, argument: machine.tuple_of(1),
    "TUPLE2": lambda machine, argument: machine.tuple_of(2),
    "TUPLE3": lambda machine, argument: machine.tuple_of(3),
    "APPEND": lambda machine, argument: machine.append([machine.pop()]),
    "APPENDS": lambda machine, argument: machine.append(machine.since_mark()),
    "SETITEM": lambda machine, argument: machine.set_items([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, argument: machine.set_items(machine.since_mark()),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, argument: machine.name(*[machine.pop(), machine.pop()][::-1]),
    "REDUCE": lambda machine, argument: machine.call(),
    "NEWOBJ": lambda machine, argument: machine.call(),
    "BUILD": lambda machine, argument: machine.attributes(),
    "BINPERSID": lambda machine, argument: machine.stored(),
}
