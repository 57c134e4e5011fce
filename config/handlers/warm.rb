#!/usr/bin/env ruby
# A warm handler in Ruby. It charges a card. The payload is like {"card": "4242", "cents": 1200}. Runs spawned, too.
require "json"
require "socket"

Encoding.default_external = "UTF-8" # JSON is UTF-8 in every locale
$stdout.sync = true

def handle(payload)
  raise ArgumentError, "card declined" if payload["card"] == "0000"
  puts "charged #{payload["cents"]} cents to #{payload["card"]}"
end

# Spawned: the payload of one job is on stdin. The last line of stderr becomes the message of the failure.
unless ENV["ZIZQ_SOCKET"]
  handle(JSON.parse($stdin.read)) rescue abort($!.full_message(highlight: false, order: :bottom))
  exit
end

wire = UNIXSocket.new(ENV["ZIZQ_SOCKET"])
wire.each_line do |line|
  job = JSON.parse(line)
  reply = begin
    handle(job["payload"])
    { ok: true }
  rescue => e
    { ok: false, message: e.message, error_type: e.class.name, backtrace: e.full_message(highlight: false) }
  end
  wire.puts(JSON.generate({ id: job["id"], **reply }))
end
