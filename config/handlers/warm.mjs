#!/usr/bin/env node
// A warm handler in Node. It charges a card. The payload is like {"card": "4242", "cents": 1200}. Runs spawned, too.
import { connect } from "node:net";
import { createInterface } from "node:readline";
import { text } from "node:stream/consumers";

async function handle({ card, cents }) {
    if (card === "0000") throw new RangeError("card declined");
    console.log(`charged ${cents} cents to ${card}`);
}

if (process.env.ZIZQ_SOCKET) {
    const wire = connect(process.env.ZIZQ_SOCKET);
    for await (const line of createInterface({ input: wire })) {
        const { id, payload } = JSON.parse(line);
        const failed = (e) => ({ ok: false, message: e.message, error_type: e.name, backtrace: e.stack });
        const reply = await handle(payload).then(() => ({ ok: true }), failed);
        wire.write(`${JSON.stringify({ id, ...reply })}\n`);
    }
} else {
    // Spawned: the payload of one job is on stdin. The last line of stderr becomes the message of the failure.
    await handle(JSON.parse(await text(process.stdin))).catch((e) => {
        console.error(`${e.stack}\n${e}`);
        process.exitCode = 1;
    });
}
