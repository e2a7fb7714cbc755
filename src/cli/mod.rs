//! The command line: parses, calls, prints. Not here: what the commands do inside a node (`node`).

pub mod load;
