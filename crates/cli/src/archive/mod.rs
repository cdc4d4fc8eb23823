//! Tar streams for `kapsel cp`: [`unpack`] writes what a guest sent, [`pack`] reads files of the host.

pub mod name;
pub mod pack;
pub mod unpack;
