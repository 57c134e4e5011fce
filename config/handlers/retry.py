#!/usr/bin/env python3
"""A handler in Python. It charges a card. The payload is like {"card": "4242", "cents": 1200}."""

import json
import os
import sys
import traceback


class BankBusy(Exception):
    pass


def charge(card, cents):
    if card == "0000":
        raise BankBusy("the bank is busy")
    print(f"charged {cents} cents to {card}")


def fail(error, **more):
    """Writes the failure to the result file and exits with status 1."""
    result = {
        "message": str(error),
        "error_type": type(error).__name__,
        "backtrace": traceback.format_exc(),
    }
    with open(os.environ["ZIZQ_RESULT_FILE"], "w") as file:
        json.dump(result | more, file)
    sys.exit(1)


try:
    payload = json.load(sys.stdin)
    charge(payload["card"], payload["cents"])
except BankBusy as error:
    fail(error, retry_in=90)
except KeyError as error:
    # The payload lacks a field, so a retry cannot succeed.
    fail(error, kill=True)
