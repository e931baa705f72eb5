"""Rehearses what its standard input asks for, in a process in which Triton's kernels are compiled ones: in the tests'
own they are interpreted. Reads and writes pickles."""

import os
import pickle
import sys

from distributed import run_ranks

from megatron_mm.config.compose import compose
from megatron_mm.rehearsal.run import Rehearsal, rehearse


def _rehearse(_init_kwargs: dict, overrides: list[str], world_size: int, rank: int, options: dict) -> Rehearsal:
    return rehearse(compose(overrides), world_size, rank, **{"text_vocab_size": 500, **options})


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = run_ranks(_rehearse, 1, *request)[0]
        except AssertionError as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main()
