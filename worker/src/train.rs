//! One optimizer step, top to bottom, on one screen.
