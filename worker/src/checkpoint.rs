//! Shard files of a checkpoint: masters and moments as safetensors in global coordinates.
