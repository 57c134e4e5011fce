#!/usr/bin/env python3
"""A warm handler in Python. It charges a card. The payload is like {"card": "4242", "cents": 1200}. Runs spawned, too."""

import json, os, socket, sys, traceback


def handle(payload):
    if payload["card"] == "0000":
        raise ValueError("card declined")
    print(f"charged {payload['cents']} cents to {payload['card']}")


# Spawned: the payload of one job is on stdin. An exception exits with status 1, and the job has failed.
if "ZIZQ_SOCKET" not in os.environ:
    handle(json.load(sys.stdin))
    sys.exit()

server = socket.socket(socket.AF_UNIX)
server.connect(os.environ["ZIZQ_SOCKET"])
wire = server.makefile("rwb")
for line in wire:
    job = json.loads(line)
    reply = {"id": job["id"], "ok": True}
    try:
        handle(job["payload"])
    except Exception as e:
        reply |= {"ok": False, "message": str(e), "error_type": type(e).__name__, "backtrace": traceback.format_exc()}
    sys.stdout.flush()
    wire.write(json.dumps(reply).encode() + b"\n")
    wire.flush()
