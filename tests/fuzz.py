"""A coverage-guided fuzzer on what reads answers: `python -m tests.fuzz [--seconds 60]`. Needs `pip install atheris`.

The first byte says how large the pieces are in which the rest arrives. What it finds is an input that raises, or leaves the bounds of
tests/transport/test_fuzz.py; atheris prints it, and writes it to a file named crash-….
"""

import argparse
import sys

import uvloop


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=int, default=60)
    seconds = arguments.parse_args().seconds
    try:
        import atheris  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        sys.exit("atheris is not installed: pip install atheris")
    with atheris.instrument_imports(include=["dispatcher.transport", "dispatcher.domain"]):
        from tests.transport.test_fuzz import outcome_of
    loop = uvloop.new_event_loop()

    def one(data: bytes) -> None:
        size = data[0] + 1 if data else 1
        answer = data[1:]
        loop.run_until_complete(outcome_of([answer[at : at + size] for at in range(0, len(answer), size)]))

    atheris.Setup([sys.argv[0], f"-max_total_time={seconds}", "-max_len=4096"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
