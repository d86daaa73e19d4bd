#![no_main]
use culvert_proto::{Handshake, Login, Next, http};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut server = http::Server::new(Login::Password);
    let _ = server.handle_input(input);
    assert!(!matches!(server.poll(), Next::Request(_)), "no login was verified");
});
