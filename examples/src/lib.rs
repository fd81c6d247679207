//! Examples: the configuration files in this folder. The crate has no code.
