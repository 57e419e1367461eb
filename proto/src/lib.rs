//! The wire between coordinator, workers and monitors: generated from `unisono/v1/*.proto`, which are its documentation.

pub mod dial;
pub mod event;
pub mod fail_point;
mod token;

/// Version 1 of the protocol.
#[allow(clippy::all, clippy::pedantic, missing_docs)]
pub mod v1 {
    tonic::include_proto!("unisono.v1");
}

/// Largest message either side accepts, bytes. Batches stay below 1 MiB; assignments of large clusters may be bigger.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

/// Marks a token after which nothing is asked of the model.
pub const NO_TARGET: u32 = u32::MAX;

/// Appends `values` to `out` as little-endian u32.
pub fn put_u32s(out: &mut Vec<u8>, values: &[u32]) {
    out.extend(values.iter().flat_map(|v| v.to_le_bytes()));
}

/// Reads little-endian u32 values; a trailing fragment is an error of the sender and yields `None`.
pub fn get_u32s(bytes: &[u8]) -> Option<Vec<u32>> {
    let words = bytes.chunks_exact(4);
    if !words.remainder().is_empty() {
        return None;
    }
    Some(words.map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect())
}
