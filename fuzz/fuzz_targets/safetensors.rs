//! The header of a shard.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((length, header)) = data.split_at_checked(4) {
        let length = u32::from_le_bytes(length.try_into().expect("four bytes"));
        let _ = unisono::checkpoint::state::tensors_within(header, u64::from(length));
    }
});
