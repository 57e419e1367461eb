//! What a worker will need and what it has used, bytes.
