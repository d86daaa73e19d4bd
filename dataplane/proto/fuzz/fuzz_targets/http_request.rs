#![no_main]
use culvert_proto::http;
use culvert_proto_fuzz::{choices, drive};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Some((login, right, outcome, input)) = choices(input) else { return };
    drive(http::Server::new(login), login, right, outcome, input);
});
