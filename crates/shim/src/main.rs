//! The process that owns one sandbox and answers containerd's Task API for it.

fn main() {}
