//! Viewers of a run. They see only the wire.
