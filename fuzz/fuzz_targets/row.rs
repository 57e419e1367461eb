//! One line of a JSONL file.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = unisono::data::untrusted::row(data);
});
