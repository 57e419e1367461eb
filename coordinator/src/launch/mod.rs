//! Starting processes and tying them to their parent's life.
