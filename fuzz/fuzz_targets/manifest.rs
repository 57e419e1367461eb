//! A checkpoint's manifest.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(manifest) = unisono::checkpoint::manifest::Manifest::parse(data, std::path::Path::new("MANIFEST.json")) {
        let again = manifest.to_json();
        let read = unisono::checkpoint::manifest::Manifest::parse(&again, std::path::Path::new("MANIFEST.json"));
        assert_eq!(read.expect("what was written reads back"), manifest);
    }
});
