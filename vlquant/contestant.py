"""The process of one contestant of `vlquant bench`: python -m vlquant.contestant MODULE SETTINGS.

Reads tasks from standard input and writes answers to standard output, one line of JSON each. Between them it waits.
"""

import json
import os
import sys
from importlib import import_module

from vlquant.ending import end_in_order
from vlquant.errors import VlquantError
from vlquant.machine import peak_memory


def main(module: str, settings: dict) -> None:
    """Answer until the input ends: to "prepare" by the module, to others by what its `open_contestant` returned."""
    # Libraries print on standard output, natively too: they get standard error, and answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(fields: dict) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    program = import_module(module)
    answer({})
    contestant = None
    for line in sys.stdin:
        task = json.loads(line)
        name = task.pop("task")
        try:
            if name == "prepare":
                answer(program.prepare(settings) or {})
            elif name == "load":
                contestant = program.open_contestant(settings)
                answer(contestant.facts())
            elif name == "memory":
                answer({"bytes": peak_memory()})
            else:
                answer({"seconds": getattr(contestant, name)(**task)})
        except VlquantError as error:
            answer({"error": str(error)})


if __name__ == "__main__":
    end_in_order()  # What it makes for a peer is removed again.
    main(sys.argv[1], json.loads(sys.argv[2]))
