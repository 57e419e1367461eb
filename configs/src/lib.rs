//! What a run is made of, read once and validated once: the run configuration ([`run`]) and the model description
//! ([`model`]). Knows neither the wire nor libtorch; both programs read the same files through it.

pub mod model;
pub mod run;
