#!/usr/bin/env python3
"""A handler in Python: charges a card. The payload is like {"card": "4242", "cents": 1200}."""

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
    """Says why in the result file, and exits with a status that is a failure."""
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
    # The job lacks something, and will at the next try.
    fail(error, kill=True)
