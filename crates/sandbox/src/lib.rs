//! The life of a sandbox: the one place where image, machine and agent meet.
