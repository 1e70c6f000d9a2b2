"""A pickle read as data: nothing it names is imported, called or made.

A pickle is a program for a small stack machine, whose instructions may call any function that Python can import. Here
the program is only taken apart (by the standard library's disassembler): numbers, text and containers become
themselves, and every class, function or call becomes a record of its name and arguments. Nothing is imported or called,
so no pickle can run code here. One that would run code in PyTorch is still refused, so that its owner learns of it.
"""

from __future__ import annotations

import _compat_pickle
import dataclasses
import pickletools
import sys
from typing import Any

from eso_jax.errors import EsoError


@dataclasses.dataclass(eq=False, slots=True)
class Global:
    """A class or function that the pickle names, e.g. "torch.FloatStorage"."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Persistent:
    """A reference to data outside the pickle, such as the numbers of a tensor of torch.save."""

    identity: Any


@dataclasses.dataclass(eq=False, slots=True)
class Inert:
    """An object that was not made: what the pickle would call, with which arguments, and the state it would set."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


# Names from the standard library that only ever stand for data. Any other of its names is refused.
DATA = {
    "_codecs": ("encode",),
    "argparse": ("Namespace",),
    "builtins": ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
                 "range", "set", "slice", "str", "tuple"),
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "copyreg": ("_reconstructor",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "operator": ("getitem",),
    "pathlib": ("Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "types": ("SimpleNamespace",),
    "typing": ("Any", "Dict", "List", "Optional", "Tuple", "Union"),
}

# Functions of other packages whose calls only rebuild data. Calls of any other function are refused; those of classes,
# told by their capital, are not.
REBUILDERS = {
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3", "torch.device", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.{name}" for core in ("core", "_core")
      for name in ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")),
}

_EMPTY: dict[str, Any] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8"}
_KEYS = (str, bytes, int, float, type(None))


def read(data: bytes, source: str) -> Any:
    """What a pickle holds: numbers, text, bytes, tuples, lists (also for sets), dicts (also for OrderedDicts and
    defaultdicts), and the three records above.

    Work and memory are in proportion to the pickle: nothing is copied. Entries under keys that are not numbers or text
    are left out, and so is what is put into a record other than its state.

    Raises:
      EsoError: it would run code, or is not a whole pickle.
    """
    try:
        return _Machine(source).run(data)
    except EsoError:
        raise
    except Exception as error:  # damaged instructions fail in any of the ways a stack machine can
        raise EsoError(f"SRC = {source!r}: its pickle is damaged ({type(error).__name__})") from error


def shown(name: str) -> str:
    """A name out of a file as part of a line: short, and without line breaks or terminal codes."""
    return name[:200] if name.isprintable() else repr(name[:200])


class _Machine:
    def __init__(self, source: str) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                break
            self.step(opcode.name, argument)
        return self.stack.pop()

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "POP":
                stack.pop() if stack else self.since_mark()
            case "POP_MARK":
                self.since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                values = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(values)))
            case "TUPLE":
                self.push(tuple(self.since_mark()))
            case "LIST" | "FROZENSET":
                self.push(self.since_mark())
            case "DICT":
                items = self.since_mark()
                self.push({})
                self.set_items(items)
            case "APPEND":
                value = stack.pop()
                self.append([value])
            case "APPENDS" | "ADDITEMS":
                self.append(self.since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.since_mark())
            case "GLOBAL":
                self.push(self.find(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                self.push(self.find(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, called = stack.pop(), stack.pop()
                self.push(self.call(called, arguments))
            case "NEWOBJ_EX":
                _, arguments, called = stack.pop(), stack.pop(), stack.pop()
                self.push(self.call(called, arguments))
            case "OBJ":
                called, *rest = self.since_mark()
                self.push(self.call(called, tuple(rest)))
            case "INST":
                arguments = tuple(self.since_mark())
                self.push(self.call(self.find(*argument.split(" ", 1)), arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state
            case "BINPERSID":
                self.push(Persistent(stack.pop()))
            case _ if name in _LITERALS:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            case _ if name in _EMPTY:
                stack.append(_EMPTY[name]())
            case _:
                raise EsoError(f"SRC = {self.source!r}: its pickle has an instruction {name}, which torch.save never "
                               "writes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def append(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def set_items(self, items: list[Any]) -> None:
        # Keys are simple ones alone: the hash of a deeply nested tuple would exhaust the stack.
        if isinstance(self.stack[-1], dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update((key, value) for key, value in pairs if isinstance(key, _KEYS))

    def find(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):  # to look up a deep tuple would exhaust the stack
            raise EsoError(f"SRC = {self.source!r}: its pickle is damaged (a class or function whose name is not text)")
        # Python reads its old names, which torch.save writes, as today's: "commands" is subprocess.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        standard = module.partition(".")[0] in sys.stdlib_module_names
        if standard and name not in DATA.get(module, ()) or not all(map(_is_class, name.split(".")[:-1])):
            raise self.refusal(f"{module}.{name}")
        return Global(f"{module}.{name}")

    def call(self, called: Any, arguments: Any) -> Any:
        """The record of a call; a call that makes a new mapping gives a dict, so that it can be filled."""
        if not isinstance(called, Global) or not isinstance(arguments, tuple):
            raise self.refusal("something other than a class or function it names")
        module, _, name = called.name.rpartition(".")
        if name not in DATA.get(module, ()) and called.name not in REBUILDERS and not _is_class(name):
            raise self.refusal(called.name)
        if called.name == "collections.defaultdict" or called.name == "collections.OrderedDict" and not arguments:
            return {}
        return Inert(called.name, arguments)

    def refusal(self, name: str) -> EsoError:
        return EsoError(f"SRC = {self.source!r}: refused: its pickle names {shown(name)}, which would run code when "
                        "PyTorch loads it; nothing was run; get the weights as .safetensors from their author")


def _is_class(name: str) -> bool:
    """Whether a name is that of a class: it begins with a capital letter."""
    return name.lstrip("_")[:1].isupper()
