"""python -m iin_fast.dropin.fingerprint CLASS [CLASS ...]

Prints the fingerprints of classes that accelerate knows, by qualified name, as the lines of sources.py.
"""

import importlib
import sys

from .library import ALL, LIBRARIES
from .registry import fingerprint, fingerprint_of, lookup
from .sources import PROGRAM_SOURCES, SOURCES

__all__ = ["main"]


def main(names: list[str]) -> int:
    """0: all found; 1: one is not known or can't be read; 2: no name."""
    if not names:
        print(__doc__)
        return 2
    worst = 0
    for name in names:
        library = LIBRARIES.get(name.split(".")[0])
        entry = next((known.by_name[name] for known in ALL if name in known.by_name), None)
        programs = None if library is None else library.programs
        functions = None
        if programs is not None:
            functions = programs.functions.get(name.removeprefix(programs.copy))
        if library is None:  # a net that another library gives to the models of these
            functions = next(
                (p.programs.functions[name] for p in LIBRARIES.values() if p.programs and name in p.programs.functions),
                None,
            )
        if entry is None and functions is None:
            print(f"{name}: no class that accelerate knows")
            worst = 1
            continue
        for module in (name.rpartition(".")[0], *(library.modules if library is not None else ())):
            importlib.import_module(module)
        cls = lookup(name)
        if programs is not None and functions is not None:
            functions = programs.named(cls, functions)
        for table, known, found in (
            ("SOURCES", SOURCES, fingerprint(cls, entry) if entry and cls else None),
            (
                "PROGRAM_SOURCES",
                PROGRAM_SOURCES,
                fingerprint_of(cls, functions) if functions is not None and cls else None,
            ),
        ):
            if found is not None:
                if table == "PROGRAM_SOURCES" and programs is not None:
                    name = name.removeprefix(programs.copy)
                state = "known" if found in known.get(name, ()) else "not known"
                print(f'{table}: "{name}": ("{found}",),  # {state}')
            elif (entry if table == "SOURCES" else functions) is not None:
                print(f"{table}: {name}: its source can't be read")
                worst = 1
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
