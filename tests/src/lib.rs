//! The whole system under test: real binaries as processes, and what their tests share.
