//! A model directory as the coordinator knows it: checked without libtorch, made from nothing.
