//! A worker's life, one struct per state: join, load, train, drain.
