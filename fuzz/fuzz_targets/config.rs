//! A run's configuration.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(config) = unisono_configs::run::RunConfig::parse("config.toml", text, std::path::Path::new("")) {
            let again = unisono_configs::run::RunConfig::parse("config.toml", &config.to_toml(), std::path::Path::new(""));
            assert_eq!(again.expect("what was written reads back"), config);
        }
    }
});
