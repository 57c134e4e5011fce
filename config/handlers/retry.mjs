#!/usr/bin/env node
// A handler in Node. It sends a mail. The payload is like {"to": "ann@example.org", "not_before": "2030-01-31T08:00:00Z"}.
import { readFileSync, writeFileSync } from "node:fs";

const { to, not_before } = JSON.parse(readFileSync(0, "utf8"));

// Sets the exit code only, because process.exit would cut off buffered output.
function fail(result) {
    writeFileSync(process.env.ZIZQ_RESULT_FILE, JSON.stringify(result));
    process.exitCode = 1;
}

if (!to?.includes("@")) {
    fail({ message: `not an address: ${to}`, error_type: "NoAddress", kill: true });
} else if (not_before && Date.parse(not_before) > Date.now()) {
    fail({ message: "too early", error_type: "TooEarly", retry_at: not_before });
} else {
    console.log(`attempt ${Number(process.env.ZIZQ_JOB_ATTEMPTS) + 1}: sent to ${to}`);
}
