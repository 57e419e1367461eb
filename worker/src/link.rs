//! gRPC client to the coordinator: one connection for control, one for data.
