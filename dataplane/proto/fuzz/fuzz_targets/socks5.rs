#![no_main]
use culvert_proto::socks5;
use culvert_proto_fuzz::{choices, drive};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((login, right, outcome, input)) = choices(input) else { return };
    drive(socks5::Server::new(login), login, right, outcome, input);
});
