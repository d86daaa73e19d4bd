#![no_main]
use culvert_proto::{Framing, http::{Exchange, Response}};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut input = input.to_vec();
    let exchange = Exchange { head_only: false, version: 1, upgrade: true, keep_alive: true };
    let mut response = Response::new(exchange);
    let mut at = 0;
    while at < input.len() {
        match response.decode(&mut input[at..]) {
            Ok(decoded) if !decoded.end && decoded.used > 0 => at += decoded.used,
            _ => return,
        }
    }
});
