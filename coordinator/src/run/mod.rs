//! The pure heart: what the coordinator decides, as a state machine without clock, network or randomness of its own.
