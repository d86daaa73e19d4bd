#![no_main]
use culvert_proto::socks5::UdpHeader;
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Ok(header) = UdpHeader::parse(input) else { return };
    assert!(header.len <= input.len());
    let mut again = Vec::new();
    UdpHeader::encode(&header.target, &mut again);
    assert_eq!(UdpHeader::parse(&again).map(|header| header.target), Ok(header.target));
});
