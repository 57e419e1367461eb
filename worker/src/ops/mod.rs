//! What the model is made of: each operation's forward and backward side by side.

pub mod view;
