//! A warm handler in Rust that charges a card. A payload looks like `{"card": "4242", "cents": 1200}`. The program also works as
//! a spawned handler.
//!
//!     cargo build --release --example warm_handler
//!     zizq-worker --mode warm --exec target/release/examples/warm_handler

#![allow(clippy::disallowed_methods, reason = "the worker's rules are not a handler's")]

use std::error::Error;
use std::io::{BufRead, BufReader, Write, stdin};
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

fn handle(payload: &Value) -> Result<(), Box<dyn Error>> {
    let card = payload["card"].as_str().ok_or("a card is missing")?;
    if card == "0000" {
        return Err("card declined".into());
    }
    println!("charged {} cents to {card}", payload["cents"]);
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let Some(socket) = std::env::var_os("ZIZQ_SOCKET") else {
        // Without `ZIZQ_SOCKET`, the program is spawned for a single job and gets the payload on stdin. An error becomes exit
        // status 1.
        return handle(&serde_json::from_reader(stdin())?);
    };
    let mut wire = UnixStream::connect(socket)?;
    for line in BufReader::new(wire.try_clone()?).lines() {
        let job: Value = serde_json::from_str(&line?)?;
        let reply = match handle(&job["payload"]) {
            Ok(()) => json!({"id": job["id"], "ok": true}),
            Err(error) => {
                json!({"id": job["id"], "ok": false, "message": error.to_string(), "error_type": "HandleError"})
            }
        };
        wire.write_all(format!("{reply}\n").as_bytes())?;
    }
    Ok(())
}
