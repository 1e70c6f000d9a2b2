"""The API page, of the docstrings: python docs/api.py OUT (needs the extra docs). A warning of pdoc's ends it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import sys
import typing
import warnings
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pdoc  # noqa: E402
import pdoc.render  # noqa: E402

import eso_jax  # noqa: E402


def read_types(kind: type) -> None:
    """Reads the types of a class's fields where they are written: pdoc looks for names of inherited ones in the wrong
    module, and for those of a NamedTuple in none."""
    known = typing.get_type_hints(kind)
    made = kind.__init__ if dataclasses.is_dataclass(kind) else kind.__new__
    made.__annotations__.update({name: known[name] for name in made.__annotations__ if name in known})


def main() -> None:
    for module in pkgutil.walk_packages(eso_jax.__path__, "eso_jax."):
        for kind in () if module.name.endswith("__main__") else vars(importlib.import_module(module.name)).values():
            fields = isinstance(kind, type) and ("__dataclass_fields__" in vars(kind) or hasattr(kind, "_fields"))
            if fields and kind.__module__ == module.name:
                read_types(kind)
    warnings.simplefilter("error")
    pdoc.render.configure(docformat="google", math=True, footer_text=f"eso_jax {eso_jax.__version__}")
    rooms = [f"eso_jax.{module.name}" for module in pkgutil.iter_modules(eso_jax.__path__) if module.name != "__main__"]
    pdoc.pdoc("eso_jax", *rooms, output_directory=Path(sys.argv[1]))


if __name__ == "__main__":
    main()
