//! A Hugging Face model directory, without its numbers: what `config.json` says ([`spec`]), which tensors follow from it
//! and where they lie in the flat buckets ([`layout`]).

mod harmless;
pub mod layout;
pub mod spec;

pub use layout::{Bucket, Layout, TensorSlot, CHUNK};
pub use spec::{Family, ModelSpec, Rope, RopeScaling};
