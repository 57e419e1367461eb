//! Sharded optimizer: exact sum, gradient norm, AdamW on the own shard.
