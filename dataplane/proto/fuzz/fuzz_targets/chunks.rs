#![no_main]
use culvert_proto::http::{Body, Chunks};
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let whole = Body::Chunked(Chunks::new()).advance(input);
    let mut body = Body::Chunked(Chunks::new());
    let mut total = 0;
    for byte in input.chunks(1) {
        match body.advance(byte) {
            Ok(taken) => total += taken,
            Err(_) => return assert!(whole.is_err()),
        }
    }
    assert_eq!(whole, Ok(total));
});
