"""Command lines whose complaints are one line, like all others here."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Complains in one line, and ends the program with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help shows an example\n")
