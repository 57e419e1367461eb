//! How workers add and share tensors: one trait, TCP on hosts.
