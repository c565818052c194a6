#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| replayer_fuzz::tcp_options::run(data));
