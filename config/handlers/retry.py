#!/usr/bin/env python3
"""A handler in Python: charges a card. The payload is like {"card": "4242", "cents": 1200}."""

import json
import os
import sys
import traceback


class BankBusy(Exception):
    """The bank says when it may be asked again."""

    def __init__(self, seconds):
        super().__init__(f"the bank is busy for {seconds} seconds")
        self.seconds = seconds


def charge(card, cents):
    if card == "0000":
        raise BankBusy(90)
    if cents <= 0:
        raise ValueError(f"cannot charge {cents} cents")
    print(f"charged {cents} cents to {card}")


def fail(error, **more):
    """Says why, in the result file, and exits with a status that is not 0."""
    result = {
        "message": str(error),
        "error_type": type(error).__name__,
        "backtrace": traceback.format_exc(),
        **more,
    }
    with open(os.environ["ZIZQ_RESULT_FILE"], "w") as file:
        json.dump(result, file)
    sys.exit(1)


try:
    payload = json.load(sys.stdin)
    charge(payload["card"], payload["cents"])
except BankBusy as error:
    fail(error, retry_in=error.seconds)
except (KeyError, ValueError) as error:
    # The job is wrong, and will be at the next try.
    fail(error, kill=True)
