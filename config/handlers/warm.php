#!/usr/bin/env php
<?php
// A warm handler in PHP. It charges a card. The payload is like {"card": "4242", "cents": 1200}. Runs spawned, too.
function handle(mixed $payload): void
{
    if ($payload["card"] === "0000") throw new DomainException("card declined");
    echo "charged {$payload["cents"]} cents to {$payload["card"]}\n";
}

if (!getenv("ZIZQ_SOCKET")) {
    // Spawned: the payload of one job is on stdin. The last line of stderr becomes the message of the failure.
    try { handle(json_decode(stream_get_contents(STDIN), true)); } catch (Throwable $e) {
        fwrite(STDERR, "$e\n{$e->getMessage()}\n");
        exit(1);
    }
    exit(0);
}

ini_set("default_socket_timeout", -1); // Otherwise fgets times out after a minute without a job.
$wire = stream_socket_client("unix://" . getenv("ZIZQ_SOCKET")) ?: exit(1);
while (($line = fgets($wire)) !== false) {
    $job = json_decode($line, true);
    $reply = ["id" => $job["id"], "ok" => true];
    try { handle($job["payload"]); } catch (Throwable $e) {
        $failure = ["message" => $e->getMessage(), "error_type" => $e::class, "backtrace" => "$e"];
        $reply = ["id" => $job["id"], "ok" => false] + $failure;
    }
    fwrite($wire, json_encode($reply, JSON_INVALID_UTF8_SUBSTITUTE) . "\n");
}
