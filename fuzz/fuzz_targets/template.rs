//! A template, and a row for it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = unisono::data::untrusted::template(data);
});
