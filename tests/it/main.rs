//! Integration tests: one binary, one file per capability, real servers on free ports.
