//! House rules as code.
