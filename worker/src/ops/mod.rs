//! What the model is made of: each operation's forward and backward side by side. On the host an operation is a fused
//! loop over fp32 or bf16, with a slow twin in ATen calls for every other kind and device; tests hold the two together.

pub mod buffer;
pub mod cross_entropy;
pub mod dispatcher;
pub mod documents;
pub mod flash;
pub mod form;
pub mod gather;
pub mod heads;
pub mod kernels;
pub mod matmul;
pub mod norm;
pub mod operation;
pub mod phantom;
pub mod rotation;
pub mod rows;
pub mod simd;
pub mod softmax;
pub mod swiglu;
pub mod switches;
pub mod view;
