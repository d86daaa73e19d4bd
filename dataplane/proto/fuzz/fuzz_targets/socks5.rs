#![no_main]
use culvert_proto::{Handshake, Login, Next, socks5};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let mut server = socks5::Server::new(Login::Password);
    let mut used = 0;
    while let Ok(taken) = server.handle_input(&input[used..]) {
        used += taken;
        match server.poll() {
            Next::Write(bytes) => {
                let len = bytes.len();
                server.sent(len);
            }
            Next::Read if used < input.len() => {}
            Next::Request(_) => panic!("no login was verified"),
            _ => return,
        }
    }
});
