#![no_main]
use culvert_proto::{Login, socks4};
use culvert_proto_fuzz::{choices, drive};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((_, right, outcome, input)) = choices(input) else { return };
    drive(socks4::Server::new(), Login::None, right, outcome, input);
});
