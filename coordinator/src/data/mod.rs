//! From files to batches: read, render, tokenize, gate, split, shuffle, pack.
