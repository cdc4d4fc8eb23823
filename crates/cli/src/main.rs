//! `kapsel`: what a person types.

fn main() {}
