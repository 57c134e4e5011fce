#!/bin/sh
# The demo handler. The job's payload is JSON on stdin, and its metadata is in ZIZQ_JOB_* variables.
# Exit status 0 acknowledges the job. Any other status fails it, and the end of stderr is the reason.
payload=$(cat)

case "$ZIZQ_JOB_TYPE" in
    send_email)
        echo "sending mail: $payload"
        ;;
    charge_card)
        echo "connecting to the bank" >&2
        echo "card declined for job $ZIZQ_JOB_ID" >&2
        exit 3
        ;;
    crash)
        kill -KILL $$
        ;;
    *)
        echo "don't know how to do $ZIZQ_JOB_TYPE" >&2
        exit 1
        ;;
esac
